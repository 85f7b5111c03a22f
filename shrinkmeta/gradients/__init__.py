"""The gradients of phi and sigma: those of one task, and their sum over tasks.

Four files compute derivatives in log sigma_m^2. The head of each file explains its symbols.
  implicit.py  of the validation loss, through the mode: <w, z> over module m
  joint.py     of the validation loss, through phi_hat and the modes of all tasks
  evidence.py  of the evidence: <s g, z> / 2 over module m, and a part from log det K
  per_task.py  of the validation loss, through the inner steps by JAX (its function `unrolled`)
The folder twice/ has second derivatives of the mode and of the evidence.
"""
