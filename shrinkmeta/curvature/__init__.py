"""The curvature C of the loss: products C v, the factor A with s C s = A^T A, and linear solvers.

`TaskModel.k_product` in mode/task_model.py computes products with K = P + s C s. Here s has the
value sigma_m at every parameter of module m, and P is the precision of the prior in whitened
coordinates.
"""
