"""Scoring the resident model: lm-eval's tasks in `harness`, their requests as frozen batches in `likelihoods` and
`generation`.
"""
