"""Optimizers: ask for a generation of genomes, tell what they scored.

An optimizer knows only the scores that it is told, and draws every random number from a counter. So the same scores
lead to the same proposals again, and a search resumes by replaying its scores.

To add an optimizer: write a class with the protocol of `base.Optimizer` in a file of its own, add a row to `OPTIMIZERS`
in the config, and run it through tests/contracts/optimizer.py.
"""
