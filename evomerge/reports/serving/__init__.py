"""Pages about runs, shown live by a server on this machine."""
