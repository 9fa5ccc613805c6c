"""What programs and notebooks call. `evomerge` itself has the names; they are imported when they are first used."""
