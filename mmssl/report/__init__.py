"""What a run looks like: figures, and a page that holds all of it."""
