"""The language of formulas: what can be written, and what it may call."""
