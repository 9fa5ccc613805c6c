"""The search: it is prepared, started from its controls, and run by generations or asynchronously."""
