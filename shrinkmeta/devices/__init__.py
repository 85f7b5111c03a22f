"""Devices: run tasks in blocks or over a mesh, place arrays, and report the memory they need."""
