"""Summarise each module: its sigma, and how far adapted parameters are from phi."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree, shown
from shrinkmeta.model.modules import (
  Labels,
  check_labels,
  check_modules,
  module_sizes,
  names,
)

PyTree = Any


class ModuleSummary(NamedTuple):
  """The size of one module, its sigma, and how far its adapted parameters are from phi.

  Attributes:
    name: the name of the module.
    size: the number of parameters.
    sigma: sigma_m, the standard deviation of theta_m around phi_m; 0: frozen, inf: no prior.
    moved: the root mean square of theta_m - phi_m over parameters and tasks; None without
      thetas, NaN for a module without parameters.
  """

  name: str
  size: int
  sigma: float
  moved: float | None


def module_summary(
  labels: Labels, phi: PyTree, log_sigma2: Mapping[str, Any], thetas: PyTree | None = None
) -> tuple[ModuleSummary, ...]:
  """Summarise each module: its size, its sigma, and how far its adapted parameters are from phi.

      moved_m = sqrt(mean over tasks t and parameters i of (theta_mti - phi_mi)^2)

  Args:
    labels: a pytree of strings with the structure of phi.
    phi: the parameters that all tasks share, a pytree of arrays [...].
    log_sigma2: {module: []}.
    thetas: adapted parameters with leaves [T, ...], or None. A leaf that is None counts as phi:
      `learner.adapt_tasks` returns None for frozen modules.

  Returns:
    One ModuleSummary for each module, sorted by path in `labels`.

  Raises:
    TypeError, ValueError: labels, log_sigma2 or thetas do not fit phi, or a value is traced.

  >>> phi, thetas = {"w": jnp.zeros(2)}, {"w": jnp.full([3, 2], 0.5)}
  >>> module_summary({"w": "body"}, phi, {"body": 0.0}, thetas)
  (ModuleSummary(name='body', size=2, sigma=1.0, moved=0.5),)
  """
  if any(isinstance(x, Tracer) for x in jax.tree.leaves((phi, log_sigma2, thetas))):
    raise TypeError("module_summary returns numbers, so it runs outside jit, vmap and grad.")
  check_labels(labels, phi, "phi")
  check_modules("log_sigma2", log_sigma2, labels)
  size = module_sizes(phi, labels)
  if thetas is None:
    moved = dict.fromkeys(size, None)
  else:
    none = lambda x: x is None
    if jax.tree.structure(thetas, is_leaf=none) == jax.tree.structure(phi, is_leaf=none):
      still = lambda p: None if p is None else jnp.asarray(p)[None]  # phi may have None leaves too
      fill = lambda t, p: still(p) if t is None else t
      thetas = jax.tree.map(fill, thetas, phi, is_leaf=none)
    parameter_tree("thetas", thetas)
    validate.same_shapes("thetas", thetas, "phi", phi, lead=1)
    total = dict.fromkeys(size, 0.0)
    squares = jax.tree.leaves(_mean_squares(thetas, phi))
    for module, square in zip(jax.tree.leaves(labels), squares, strict=True):
      total[module] += float(square)
    moved = {m: math.sqrt(total[m] / size[m]) if size[m] else math.nan for m in size}
  return tuple(
    ModuleSummary(m, size[m], float(np.exp(0.5 * np.asarray(log_sigma2[m]))), moved[m])
    for m in names(labels)
  )


@jax.jit  # one program for all leaves; outside jit JAX compiles every operation for every shape
def _mean_squares(thetas: PyTree, phi: PyTree) -> PyTree:
  """Return the sum of (theta - phi)^2 of each leaf, as a mean over tasks: a tree of []."""
  wide = lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
  square = lambda t, p: jnp.sum(jnp.mean(jnp.square(wide(t) - wide(p)[None]), 0))
  return jax.tree.map(square, thetas, phi)


def format_summary(summaries: Sequence[ModuleSummary]) -> str:
  """Write what `module_summary` returned as a plain-text table.

  Args:
    summaries: one ModuleSummary for each module.

  Returns:
    A text with one line for each module, below a line with the names of the columns. The column
    rms(theta - phi) is left out if `module_summary` got no thetas.

  Raises:
    TypeError: an entry is not a ModuleSummary.

  >>> body, head = ModuleSummary("body", 90, 0.0, 0.0), ModuleSummary("head", 10, 0.5, 0.3)
  >>> print(format_summary([body, head]))
  module  parameters  sigma  rms(theta - phi)
  body            90      0                 0
  head            10    0.5               0.3
  """
  if not isinstance(summaries, Sequence) or isinstance(summaries, (str, ModuleSummary)):
    raise TypeError(f"summaries must be what sm.module_summary returned; got {shown(summaries)}.")
  for i, summary in enumerate(summaries):
    validate.instance(f"summaries[{i}]", summary, ModuleSummary, "a shrinkmeta.ModuleSummary")
  cells = [("module", "parameters", "sigma")]
  cells += [(m.name, str(m.size), f"{m.sigma:.3g}") for m in summaries]
  if any(m.moved is not None for m in summaries):
    moved = ["" if m.moved is None else f"{m.moved:.3g}" for m in summaries]
    cells = [(*row, x) for row, x in zip(cells, ["rms(theta - phi)", *moved], strict=True)]
  return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
  """Align the cells of a table: the first column to the left, the others to the right.

  Args:
    cells: the lines of the table. Every line has the same number of texts.

  Returns:
    the text of the table.

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
