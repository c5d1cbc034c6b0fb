"""Operators, the providers that compute them, and the choice among providers. Knows no graph."""
