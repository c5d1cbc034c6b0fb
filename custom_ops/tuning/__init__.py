"""The tuner: times every provider on this machine's GPUs and stores the table."""
