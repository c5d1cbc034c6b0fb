"""The passes, one in each file. Each rewrites a graph and leaves it valid.

Each is a function (graph, context) -> whether the graph changed, listed in `registry`. Three
files are shared: `fuser` is the base class of the fusing passes, `coalesced` shrinks coalesced
all-reduces, and `split_norm_quant` prepares quantised norms for `raise_ops`.
"""
