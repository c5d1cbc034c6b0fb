"""Define spellings as data: collectives, norms, and the patterns that fuse."""
