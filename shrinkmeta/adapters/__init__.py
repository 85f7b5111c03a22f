"""From learned sigma to a product: adapters, the choice of modules, what each task owns, and serving."""
