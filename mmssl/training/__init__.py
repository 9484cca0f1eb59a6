"""The one training loop: steps, optimisers, checkpoints, progress."""
