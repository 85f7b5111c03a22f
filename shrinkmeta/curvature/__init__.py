"""The curvature of the loss: products C v, its factor, and solves with K = I + sigma C sigma."""
