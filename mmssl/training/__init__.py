"""The one training loop: steps, optimizers, checkpoints, progress."""
