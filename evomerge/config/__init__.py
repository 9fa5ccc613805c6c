"""The search file: one module per part of it, `search` for the whole, `files` for reading it."""
