"""Keeps ranks together that compile each for itself.

    fingerprint  describes what every rank must have equal in a rewritten graph
    agreement    compares fingerprints while the ranks compile; where they differ, a group's collectives stay as written

What the ranks run is compared once more before it runs: fusewire.custom_ops.coordination.rendezvous.
"""
