"""Pure tensor functions: augmentation, masking, losses, random draws, gathering across processes."""
