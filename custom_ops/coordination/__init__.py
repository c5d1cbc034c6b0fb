"""Communication and votes of a process group's ranks, over its store and host memory, not the GPUs.

log          lines on stderr
timeouts     every time limit, and the variable that scales them
store        the group's key-value store, and the polling loop
processes    whether the processes of other ranks have ended
busy         messages that a rank compiles or tests, and is not dead
vote         a question that every rank answers, with one outcome for all
watchdog     the thread that reports faults of kernels
rendezvous   the comparison of the graphs that ranks are about to run
"""
