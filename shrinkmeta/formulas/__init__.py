"""Make the matrices of a mixed model from a table and a formula."""
