"""The commands of `python -m fusewire`, one in each file.

Each has `add_arguments(parser)` and `run(arguments) -> exit status`; `fusewire/__main__.py` lists
them.
"""
