"""Pictures of the results of runs."""
