"""From files, folders, shards, the Hub or the toy world to batches of tensors."""
