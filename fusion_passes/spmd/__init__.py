"""Keep ranks together that compile separately.

    fingerprint  describes what every rank must have equal in a rewritten graph
    agreement    compares fingerprints at compile time; if they differ, collectives stay as written

fusewire.custom_ops.coordination.rendezvous compares again before the ranks run a graph.
"""
