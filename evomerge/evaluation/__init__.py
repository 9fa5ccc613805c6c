"""Scoring the resident model: lm-eval's tasks behind `harness`, frozen batches in `prepared`."""
