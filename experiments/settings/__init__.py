"""Settings of runs, the flags that set them, and their checks."""
