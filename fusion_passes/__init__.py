"""The passes over a compiled graph, the pipeline that runs them, and the torch.compile backend.

config     PassConfig: the options
context    the state of one run over one graph
compiler   PyTorch's compiler: its private parts
analysis   reads graphs: norms, paths, proofs about ranks
passes     the passes, one a file
spmd       fingerprints, and the agreement of ranks on them
report     the report
registry   the order of the passes; register_pass
pipeline   run_passes
cache_key  the passes' part of the compile cache's key
observer   shows graphs to `fusewire explain`
backend    the backend "fusewire", and enable
"""
