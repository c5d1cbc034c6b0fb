"""Operators, the providers that compute them, and the choice among providers. Knows no graph.

ops           the operators and the registry of their providers
coordination  what ranks exchange on their hosts: votes, comparisons, time limits
workspaces    memory that ranks share
dispatch      the choice of a provider for each call
providers     batch-invariant norms, FlashInfer, symm_mem
tuning        measurements for the choice
api           what `fusewire` exports: prepare, workspaces, close, check, on_fault
environment   environment variables
"""
