"""Tables of what runs found, in Markdown."""
