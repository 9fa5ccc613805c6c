"""Optimizers: ask for a generation of genomes, tell what they scored.

All of them work on told scores alone and draw every random number from a counter, so that telling the same things again
gives the same proposals: that replay is how a search resumes.

To add one: write a class with the protocol of `base.Optimizer` in a file of its own, add a row to `OPTIMIZERS` in the
config, and run it through tests/contracts/optimizer.py.
"""
