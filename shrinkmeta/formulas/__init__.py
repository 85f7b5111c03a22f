"""From a table and a formula to the matrices of a mixed model."""
