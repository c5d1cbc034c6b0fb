"""Analyse graphs: norms by their arithmetic, paths from collectives, proofs about ranks."""
