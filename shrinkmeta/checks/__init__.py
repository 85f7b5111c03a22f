"""Checks of what callers pass: types, numbers, paths and optimisers. Errors name the argument."""
