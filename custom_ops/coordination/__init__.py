"""How the ranks of a process group talk and decide together: over the group's store and host
memory, never over the GPUs.

log          lines on stderr
timeouts     every time limit, and the variable that scales them
store        the group's key-value store, and the one polling loop
vote         a question that every rank answers, with one outcome for all of them
rendezvous   the comparison of what the ranks are about to run
"""
