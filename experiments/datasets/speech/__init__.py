"""Data sets of recorded speech."""
