"""The archive of a search in Optuna's storage: the only place that knows it."""
