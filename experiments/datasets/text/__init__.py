"""Data sets of written text."""
