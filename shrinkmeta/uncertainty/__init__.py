"""How uncertain a task is: its posterior, and whether predicted probabilities hold."""
