"""What held-out items say of a candidate beside its controls."""
