"""Merging from file to file, one tensor at a time."""
