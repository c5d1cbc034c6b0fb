"""The commands of `python -m fusewire`, one a file."""
