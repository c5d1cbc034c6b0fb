"""The operators: what each one means (native), its schema, and the registry of its providers."""
