"""The passes, one a file. Each rewrites a graph and leaves it valid."""
