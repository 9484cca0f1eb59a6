"""Was the task solved honestly: chance and collapse, shortcuts, conflicts between tasks."""
