"""How files of data sets are found, read, checked and cached."""
