"""Tables of the results of runs, in Markdown."""
