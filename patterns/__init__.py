"""Spellings as data: collectives, norms, and the fusions that the matcher looks for."""
