"""What became of every all-reduce: the records, their texts, and where they are kept."""
