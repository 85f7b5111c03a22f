"""The gradients of phi and sigma: those of one task, and their sum over tasks.

Where each formula of sigma's gradient is computed:
  from the validation loss, through the mode: d/d log sigma_m^2 = <w, z>      implicit.py
  the same, through phi_hat and the modes of all tasks                        joint.py
  from the evidence: <s g, z> / 2 and the derivative of log det K             evidence.py
  through unrolled steps: automatic differentiation, `unrolled`               per_task.py
"""
