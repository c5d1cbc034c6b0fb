"""The tuner: times every provider on this machine's GPUs and stores the table.

tuner    tune: one table, from the set-up to the disk
measure  checks and times the candidates, in step on all ranks
timers   timers, inputs and expected results of one call
"""
