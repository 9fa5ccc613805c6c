"""Run directories, and searches as jobs of a cluster."""
