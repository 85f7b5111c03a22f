"""Data sets: how their files are read and checked, and how tasks are drawn from them."""
