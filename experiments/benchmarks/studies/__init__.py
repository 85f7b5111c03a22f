"""Studies of the library's own parts."""
