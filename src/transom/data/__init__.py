"""Text on disk to batches of tokens: sources, token files, the order of an epoch, packed rows."""
