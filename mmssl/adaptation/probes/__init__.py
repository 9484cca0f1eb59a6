"""One probe a module: a classifier on frozen features, or on an encoder that is trained along."""
