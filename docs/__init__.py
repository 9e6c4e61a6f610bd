"""The pages, and what builds their tables."""
