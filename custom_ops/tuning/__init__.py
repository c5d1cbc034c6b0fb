"""The tuner: times every provider on this machine's GPUs and keeps the table."""
