"""`python -m evomerge` is the command `evomerge`."""

from evomerge.cli import main

main()
