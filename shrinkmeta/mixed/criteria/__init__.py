"""The criteria that a mixed model maximises, with gradients, and the search for the maximum."""
