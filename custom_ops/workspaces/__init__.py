"""Workspaces: memory that the ranks of a group share, made and checked by all of them together."""
