"""The passes, one in each file. Each rewrites a graph and leaves it valid."""
