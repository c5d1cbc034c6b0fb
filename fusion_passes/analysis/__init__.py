"""What a graph means: norms by their arithmetic, paths from collectives, proofs."""
