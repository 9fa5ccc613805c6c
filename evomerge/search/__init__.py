"""The search: prepared, started from its controls, run by generations or asynchronously."""
