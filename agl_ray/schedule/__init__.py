"""Set by its room."""
