"""Second derivatives of the mode and of the evidence.

newton.py computes them for `twice=True`. refusals.py raises errors for all other derivatives.
"""
