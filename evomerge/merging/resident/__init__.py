"""Merging in memory: the models of a search, and the one that every candidate is written into."""
