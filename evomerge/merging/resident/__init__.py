"""Merging in memory: the models of a search, and the model that every candidate is written into."""
