"""Low-rank adapters as modules of a frozen network, and their export to other libraries."""
