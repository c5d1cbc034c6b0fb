"""Communication and votes of a process group's ranks, over its store and host memory, not the GPUs.

log          lines on stderr
timeouts     every time limit, and the variable that scales them
store        the group's key-value store, and the polling loop
vote         a question that every rank answers, with one outcome for all
rendezvous   the comparison of the graphs that ranks are about to run
"""
