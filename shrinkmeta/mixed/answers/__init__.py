"""Fit a formula to a table, summarise the fit, and predict new rows."""
