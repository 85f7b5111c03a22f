"""Runs: one algorithm with its settings, trained from one seed and evaluated."""
