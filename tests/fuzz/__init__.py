"""Random programs against the passes, and what must hold for each."""
