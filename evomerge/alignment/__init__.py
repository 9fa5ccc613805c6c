"""Alignment: permutations that bring a model next to another one and change nothing that it says."""
