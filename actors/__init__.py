"""The kinds of process that Ray places: one file each, thin, each wrapping a room of the library."""
