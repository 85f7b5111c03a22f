"""Linear and generalised linear mixed models, fitted to tables, simulated, and drawn."""
