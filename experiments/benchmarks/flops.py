"""Useful floating-point operations of a step, counted by hand so that libraries can be compared.

A multiply-add of a convolution or a matrix product counts as two operations. Nothing else counts.
The unit below is one forward pass of the same examples.

| computation | forward passes |
|---|---|
| a gradient | 3 |
| a product with the Hessian | 6, and 3 once to linearise the gradient |
| a product with Gauss-Newton's matrix | 4 (2 forwards, 2 backwards), and 1 once |
| backwards through an inner step | 6 |

Operations that an implementation adds to these, or does twice, are not useful. XLA's own count is
too small: docs/hazards.md#loop-flops.
"""

from experiments.benchmarks.workloads import Workload


def forward(workload: Workload, only: tuple[str, ...] | None = None) -> int:
  """Return the operations of one example's forward pass, in all modules or in those of `only`."""
  parts = _by_module(workload)
  return sum(count for name, count in parts.items() if only is None or name in only)


def _by_module(workload: Workload) -> dict[str, int]:
  width, parts = workload.width, {}
  if workload.net == "conv":
    side, channels = workload.size, 1
    for i in range(workload.depth):
      parts[f"conv_{i}"] = 2 * side * side * 9 * channels * width
      side, channels = max(1, side // 2), width
    return parts | {"head": 2 * side * side * width * workload.ways}
  if workload.net == "transformer":
    length = workload.size
    projections = 2 * length * 12 * width * width  # 4 of attention, 8 of the MLP
    attention = 2 * length * length * 2 * width  # scores, and the mean of values
    parts = {f"block_{i}": projections + attention for i in range(workload.depth)}
    return parts | {"head": 2 * length * width * workload.vocabulary}
  sizes = [1, *[width] * workload.depth, 1]
  return {f"layers_{i}": 2 * a * b for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))}


def step(workload: Workload, algorithm: str, curvature: str = "hessian") -> int:
  """Return the operations of one step of `algorithm` on all tasks.

  If only some modules are task-specific, the others cost one forward pass on the training examples
  and a part of the validation gradient.
  """
  whole, part = forward(workload), forward(workload, workload.moving)
  train, val = workload.examples, workload.ways * workload.queries
  seen = workload.batch_size or train
  implicit = algorithm in ("imaml", "sigma_imaml")
  count = (workload.mode_steps if implicit else workload.steps) * 3 * seen * part
  if algorithm == "maml":
    count += workload.steps * 6 * seen * part
  if algorithm not in ("reptile", "adapt"):
    count += 3 * val * whole
  if implicit:
    start, product = (3, 6) if curvature == "hessian" else (1, 4)
    count += (start + workload.cg * product) * train * part
  if part < whole:
    count += train * (whole - part)
  return workload.tasks * count
