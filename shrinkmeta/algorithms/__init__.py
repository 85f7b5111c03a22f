"""The family of algorithms: a table of them, and one constructor for each line of the table."""
