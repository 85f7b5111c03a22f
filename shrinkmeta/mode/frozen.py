"""Modules that move and modules that are held: the parameters cut in two before any task runs.

A module with sigma = 0 stays at phi. Cut off beforehand it has no task axis, no gradient in the
inner loop, no optimiser state and no copy: what is left is a smaller model, of which the inner
optimisation and the linear solve need not know that it is a part. A tree is cut by writing None,
an empty subtree, in place of the leaves that belong to the other half.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta import validate
from shrinkmeta.config import Frozen
from shrinkmeta.model import modules

PyTree = Any


def frozen_modules(log_sigma2: Mapping[str, Any], also: Iterable[str] = ()) -> Frozen:
  """Modules whose log sigma^2 is known to be -inf (outside jit, or a constant inside), and `also`.

  Empty where that is all of them: a model without parameters is none. sigma = 0 then holds them.

  Raises:
    ValueError: `also` names what is no module.
  """
  if isinstance(also, str) or not set(also := tuple(also)) <= log_sigma2.keys():
    raise ValueError(
      f"frozen must be a tuple of modules; got {also!r}, and the modules are {tuple(log_sigma2)}."
    )
  values = {module: validate.known(value) for module, value in log_sigma2.items()}
  known = {m for m, value in values.items() if value is not None and value == -jnp.inf}
  frozen = frozenset(known | set(also))
  return frozen if frozen != log_sigma2.keys() else frozenset()


def as_built(
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  labels: modules.Labels,
  built: Mapping[str, float],
) -> PyTree:
  """phi, after a check that log sigma^2 is what a program was built for.

  Args:
    built: {module: sigma}, 0 or inf, of the modules that the program takes for frozen or free.

  Raises ValueError where log sigma^2 is known. Under jit it is not: there phi of a module that it
  contradicts becomes NaN, so that tasks count as failed instead of being adapted as they were not
  meant to.
  """
  for module, sigma in sorted(built.items()):
    value, want = validate.known(log_sigma2[module]), -jnp.inf if sigma == 0 else jnp.inf
    if value is not None and value != want:
      state = "frozen (init_sigma 0, or a mask)" if sigma == 0 else "free (sigma infinite)"
      raise ValueError(
        f"Module {module!r} is {state} here, but log_sigma2[{module!r}] is {value}, not {want}. "
        "Build a learner for it, with another init_sigma, row or mask; or leave it out of `frozen`."
      )

  def leaf(label: str, p: jax.Array) -> jax.Array:
    if label not in built:
      return p
    same = jnp.isneginf if built[label] == 0 else jnp.isposinf
    return jnp.where(same(log_sigma2[label]), p, jnp.nan)

  return jax.tree.map(leaf, labels, phi)


def freeze(
  phi: PyTree, log_sigma2: Mapping[str, Any], labels: modules.Labels, also: Iterable[str]
) -> tuple[PyTree, Frozen]:
  """`as_built` phi and `frozen_modules`, of a caller who names some of them."""
  also = also if isinstance(also, str) else tuple(also)
  frozen = frozen_modules(log_sigma2, also)
  return as_built(phi, log_sigma2, labels, dict.fromkeys({*frozen, *also}, 0.0)), frozen


def moving(tree: PyTree, labels: modules.Labels, frozen: Frozen) -> PyTree:
  """The part of a tree like `labels` that belongs to modules not frozen.

  >>> moving({"body": 1.0, "head": 2.0}, {"body": "body", "head": "head"}, frozenset({"body"}))
  {'body': None, 'head': 2.0}
  """
  return jax.tree.map(lambda label, x: None if label in frozen else x, labels, tree)


def merge(part: PyTree, rest: PyTree) -> PyTree:
  """The whole tree: leaves of `part`, and where it has None those of `rest`, cut or whole.

  >>> merge({"body": None, "head": 3.0}, {"body": 1.0, "head": 2.0})
  {'body': 1.0, 'head': 3.0}
  """
  none = lambda x: x is None
  return jax.tree.map(lambda x, y: y if x is None else x, part, rest, is_leaf=none)
