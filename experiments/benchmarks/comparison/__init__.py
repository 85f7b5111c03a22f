"""Measurements in turn with other settings and other libraries."""
