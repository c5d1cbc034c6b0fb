"""Workspaces: memory that the ranks of a group share, made and checked by all of them together.

provider      the interface: WorkspaceProvider, Workspace; PROVIDERS
registry      REGISTRY: this process's workspaces, made by votes
precompile    compile_ahead: kernels before the calls that need them
stream_order  the order of calls on one GPU
capture       whether a CUDA graph is being captured
known_answer  inputs for self-tests
"""
