"""What keeps ranks together that compile each for itself.

    replication  which values are the same on every rank
    fingerprint  what of a rewritten graph every rank must have alike
    agreement    compares fingerprints while the ranks compile, and leaves a group's collectives as written if they differ

What they run is compared once more, before it runs: fusewire.custom_ops.coordination.rendezvous.
"""
