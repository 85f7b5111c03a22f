"""What a mixed model's fit maximises: likelihoods with gradients, and the search for a maximum."""
