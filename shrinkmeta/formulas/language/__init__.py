"""The syntax of formulas: the parser, and the functions that a formula may call."""
