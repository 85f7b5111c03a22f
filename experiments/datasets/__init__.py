"""Data sets: where they come from, how they are checked and how tasks are drawn from them."""
