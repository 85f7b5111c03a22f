"""What phi and sigma follow: the gradient of one task, and the sum over tasks.

The formula of sigma's gradient:
  from the validation loss, through the mode: d/d log sigma_m^2 = <w, z>      implicit.py
  the same, through phi_hat and the modes of all tasks                        joint.py
  from the evidence: <s g, z> / 2 and the derivative of log det K             evidence.py
  through unrolled steps: automatic differentiation, `unrolled`               per_task.py
"""
