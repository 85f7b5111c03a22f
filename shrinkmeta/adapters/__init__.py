"""Low-rank adapters of a frozen network as modules, and their export to other libraries."""
