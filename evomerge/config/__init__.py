"""The search file: one module for each part of it, `search` for the whole file, `files` for reading it."""
