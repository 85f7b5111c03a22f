"""Data sets of characters: Omniglot, and glyphs drawn from fonts."""
