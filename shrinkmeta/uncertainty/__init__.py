"""Uncertainty: the posterior of one task, and the calibration of predictions."""
