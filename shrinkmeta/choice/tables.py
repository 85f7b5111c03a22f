"""What is known of each module and of each set on the path, as NamedTuples and as text."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class ModuleLoss(NamedTuple):
  """How the loss depends on one module.

  Attributes:
    module: its name.
    sigma: sigma_m in the state; inf is free.
    moved: root mean square of theta_hat - phi over its parameters and the tasks, with all modules
      task-specific.
    parameters: the number of its parameters.
    bytes: of its parameters, for one task.
    only: the mean loss with only this module task-specific, nats per example.
    only_error: the paired standard error of `only` minus the loss with none.
    without: the mean loss with all but this module task-specific, nats per example.
    without_error: the paired standard error of `without` minus the loss with all.
  """

  module: str
  sigma: float
  moved: float
  parameters: int
  bytes: int
  only: float
  only_error: float
  without: float
  without_error: float


class CurvePoint(NamedTuple):
  """One set of task-specific modules on the nested path.

  Attributes:
    added: the module that this set has and the one before has not; None for the empty set.
    modules: the task-specific modules, in the order of addition.
    loss: the mean over tasks of the validation loss, nats per example.
    error: the paired standard error of its difference to the best loss on the path.
    share: of all parameters, those that are task-specific, 0 to 1.
    parameters: the number of task-specific parameters.
    bytes: of these, for one task.
    seconds: that one task takes to adapt, with the other modules cut off; NaN if not measured.
  """

  added: str | None
  modules: tuple[str, ...]
  loss: float
  error: float
  share: float
  parameters: int
  bytes: int
  seconds: float


def table_text(rows: Sequence[ModuleLoss]) -> str:
  """Write the modules as a plain-text table, one line each.

  Args:
    rows: one a module.

  Returns:
    lines joined by newlines.
  """
  head = ("module", "sigma", "rms(theta - phi)", "parameters", "bytes/task")
  head = (*head, "only it", "+-", "all but it", "+-")
  cells = [
    (r.module, f"{r.sigma:.3g}", f"{r.moved:.3g}", f"{r.parameters:,}", f"{r.bytes:,}")
    + (f"{r.only:.4f}", _error(r.only_error), f"{r.without:.4f}", _error(r.without_error))
    for r in rows
  ]
  return aligned([head, *cells])


def curve_text(points: Sequence[CurvePoint], chosen: int) -> str:
  """Write the path as a plain-text table, one line a set; a star marks the chosen set.

  Args:
    points: from the empty set to all modules.
    chosen: the number of the chosen set.

  Returns:
    lines joined by newlines.
  """
  timed = not all(math.isnan(p.seconds) for p in points)
  head = ("task-specific", "", "loss", "- best", "+-", "share", "bytes/task")
  best = min(p.loss for p in points)
  cells = []
  for i, p in enumerate(points):
    name = "none" if p.added is None else f"+ {p.added}"
    loss = (f"{p.loss:.4f}", f"{p.loss - best:.4f}", _error(p.error))
    own = (name, "*" if i == chosen else "", *loss, f"{100 * p.share:.1f}%", f"{p.bytes:,}")
    cells.append((*own, f"{p.seconds:.2g}") if timed else own)
  return aligned([(*head, "seconds/task") if timed else head, *cells])


def _error(error: float) -> str:
  """A standard error, or a dash where one task gives none."""
  return "-" if math.isnan(error) else f"{error:.4f}"


def aligned(cells: Sequence[Sequence[str]]) -> str:
  """Align the cells of a table: the first column to the left, the others to the right.

  Args:
    cells: lines of equally many texts.

  Returns:
    lines joined by newlines.

  >>> print(aligned([("module", "loss"), ("head", "1.25")]))
  module  loss
  head    1.25
  """
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  line = lambda texts: "  ".join(
    [texts[0].ljust(widths[0])]
    + [text.rjust(width) for text, width in zip(texts[1:], widths[1:], strict=True)]
  )
  return "\n".join(line(texts).rstrip() for texts in cells)
