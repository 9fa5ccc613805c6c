"""Trackers: what people already use to watch experiments. A tracker is a file here and a row in `config.tables`."""
