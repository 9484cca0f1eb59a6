"""The networks inside encoders, one file a library; a library's name is its file's name."""
