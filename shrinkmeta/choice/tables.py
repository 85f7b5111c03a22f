"""The measurements of each module and of each set on the path, as NamedTuples and as text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from shrinkmeta.diagnostics.summary import aligned


class ModuleLoss(NamedTuple):
  """The size of one module, how far adaptation moves it, and the losses with and without it.

  Losses are means over tasks of the validation loss, in nats per example.

  Attributes:
    module: the name of the module.
    sigma: sigma_m in the state, in units of theta. 0 means frozen, inf means no prior.
    moved: the root mean square of theta_hat - phi, in units of theta, over the tasks and the
      parameters of the module, if all modules are task-specific. 0 for a frozen module.
    parameters: the number of parameters of the module.
    bytes: the size of these parameters for one task, in bytes.
    only: the mean loss if only this module is task-specific.
    only_error: the paired standard error of `only` minus the loss with no task-specific module.
    without: the mean loss if all modules but this one are task-specific.
    without_error: the paired standard error of `without` minus the loss with all modules.
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
    added: the module that this set adds to the previous set. None for the empty set.
    modules: the task-specific modules, in the order in which they were added.
    loss: the mean over tasks of the validation loss, in nats per example.
    error: the paired standard error of `loss` minus the best loss on the path.
    share: the task-specific parameters as a share of all parameters, from 0 to 1.
    parameters: the number of task-specific parameters.
    bytes: the size of the task-specific parameters of one task, in bytes.
    seconds: the time to adapt one task with the other modules frozen. NaN if it was not measured.
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
  """Write the modules as a plain-text table, one line for each module.

  Args:
    rows: a ModuleLoss for each module.

  Returns:
    the text of the table.
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
  """Write the path as a plain-text table, one line for each set, with a star at the chosen set.

  Args:
    points: a CurvePoint for each set of the path, from the empty set to all modules.
    chosen: the position of the chosen set in `points`.

  Returns:
    the text of the table.
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
  """Write a standard error, or a dash for NaN, the error of a single task."""
  return "-" if math.isnan(error) else f"{error:.4f}"
