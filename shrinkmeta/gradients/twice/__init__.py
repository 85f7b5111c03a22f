"""Second derivatives of the mode and of the evidence.

newton.py has them exactly, for `twice=True`. refusals.py raises an error where there are none.
"""
