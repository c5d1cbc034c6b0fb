"""Analyse graphs: norms by their arithmetic, paths from collectives, proofs about ranks.

graph            helpers to read and change graphs
norm_reader      finds every RMSNorm of a graph; norm_arithmetic and norm_weights read its parts
paths            the steps from an all-reduce to a norm, and how they move; scales: their factors
quantizations    how a norm is quantised to FP8, by its arithmetic; quantizing_ops: by operators
norm_quant_ops   operators that are a norm and its quantisation; norm_quant_forms tries them
sites            why a norm and its all-reduce cannot be rewritten
replication      whether a value is equal on every rank
why_unfused      why an all-reduce reaches no norm
"""
