"""Wrap the private parts of PyTorch's compiler; tests/unit/test_canaries.py tests each.

inductor       pattern matcher, tracing, fake values, lowerings, copies of graphs
mutating_calls calls of operators that write into arguments, functional or not
compile_fx     Inductor's entry point, options and hook for custom passes
compile_cache  the cache's hits and switches
cache_artifact files beside the cache; imported with fusewire itself
eager          calls on real tensors while a graph is compiled
dynamo         restarts with floats as numbers, graph breaks, the kind of a graph
"""
