"""Devices: run tasks in blocks or over a mesh, place arrays, and measure the memory needed."""
