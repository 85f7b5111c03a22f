"""The family of algorithms: a table, and a constructor for each of its lines."""
