"""The commands of `python -m fusewire`, one in each file."""
