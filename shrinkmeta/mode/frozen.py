"""Separate the frozen modules from the task-specific ones before any task runs.

A frozen module has sigma = 0 and stays at phi. Its parameters are taken out of the tree first:
None, an empty subtree, takes the place of each leaf. They then have no task axis, no gradient in
the inner loop, no optimiser state and no copy for each task. The inner optimisation and the linear
solve see an ordinary, smaller tree.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree, shown
from shrinkmeta.config import Frozen, Spec
from shrinkmeta.model import modules

PyTree = Any


Known = Mapping[str, Any]  # {module: log sigma^2, or None while it is traced}


def frozen_modules(known: Known, also: Iterable[str] = ()) -> Frozen:
  """Return the modules whose log sigma^2 is known to be -inf, and those named in `also`.

  Outside jit the value is always known. Under jit it is known only if it is a constant. If every
  module is frozen, return the empty set: the inner problem needs at least one parameter, and
  sigma = 0 already keeps it at phi.

  Args:
    known: {module: log sigma^2, or None while it is traced}.
    also: modules that the caller knows to be frozen.
  """
  frozen = frozenset(m for m, v in known.items() if v is not None and v == -jnp.inf) | set(also)
  return frozen if frozen != known.keys() else frozenset()


def as_built(
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  known: Known,
  labels: modules.Labels,
  built: Mapping[str, float],
) -> PyTree:
  """Check that log sigma^2 fits the modules that a program treats as frozen or free; return phi.

  Under jit the values of log sigma^2 are not known. If one contradicts `built`, the module's phi
  becomes NaN at run time. All tasks then count as failed, instead of being adapted wrongly.

  Args:
    phi: the parameters that all tasks share.
    log_sigma2: {module: []}.
    known: {module: log sigma^2, or None while it is traced}.
    labels: the module of every parameter.
    built: {module: sigma} of the modules that the program treats as frozen (0) or free (inf).

  Raises:
    ValueError: a known log sigma^2 contradicts `built`.
  """
  _check(known, built)
  if not built:
    return phi

  def leaf(label: str, p: jax.Array) -> jax.Array:
    if label not in built:
      return p
    same = jnp.isneginf if built[label] == 0 else jnp.isposinf
    return jnp.where(same(log_sigma2[label]), p, jnp.nan)

  return jax.tree.map(leaf, labels, phi)


def check_own(spec: Spec, log_sigma2: Mapping[str, Any]) -> None:
  """Raise an error unless log sigma^2 of a state has the modules of a learner, and fits it.

  A module that is frozen or free in the learner must not have another sigma in the state. Functions
  that can read log sigma^2 call this before they compile, because under jit `as_built` can only
  make all tasks fail. All other modules may have any sigma in the state, 0 included.

  Args:
    spec: the spec of the learner.
    log_sigma2: {module: []} of the state. Values that are traced, or on another host, pass.

  Raises:
    TypeError, ValueError: modules are missing or unknown, or a known log sigma^2 contradicts the
      learner.
  """
  modules.check_modules("state.log_sigma2", log_sigma2, spec.labels)
  _check({module: validate.known(log_sigma2[module]) for module in spec.built}, spec.built)


def _check(known: Known, built: Mapping[str, float]) -> None:
  """Raise ValueError if a known log sigma^2 contradicts `built`."""
  for module, sigma in sorted(built.items()):
    value, want = known[module], -np.inf if sigma == 0 else np.inf
    if value is not None and value != want:
      found = np.exp(0.5 * np.asarray(value, np.float64))
      held = "kept at phi" if sigma == 0 else "adapted without a prior"
      raise ValueError(
        f"Module {module!r} is {held} here, but its sigma is {found:.3g}. The state may be that of "
        "another learner: pass the state that learner.keep returned with this learner, or one that "
        "its init, its update or sm.fit returned. In a function with the argument `frozen`, leave "
        "the module out of it."
      )


def freeze(
  phi: PyTree,
  log_sigma2: Mapping[str, Any],
  known: Known,
  labels: modules.Labels,
  also: Iterable[str],
) -> tuple[PyTree, Frozen]:
  """Find the frozen modules, and check log sigma^2 against them.

  Args:
    phi: the parameters that all tasks share.
    log_sigma2: {module: []}.
    known: {module: log sigma^2, or None while it is traced}.
    labels: the module of every parameter.
    also: the modules that the caller names as frozen.

  Returns:
    (phi after the check of `as_built`, the names of the frozen modules).
  """
  also = modules.module_names("frozen", also, labels)
  frozen = frozen_modules(known, also)
  built = dict.fromkeys({*frozen, *also}, 0.0)
  return as_built(phi, log_sigma2, known, labels, built), frozen


def moving(tree: PyTree, labels: modules.Labels, frozen: Frozen) -> PyTree:
  """Return `tree` with None in place of the leaves of frozen modules.

  >>> moving({"body": 1.0, "head": 2.0}, {"body": "body", "head": "head"}, frozenset({"body"}))
  {'body': None, 'head': 2.0}
  """
  return jax.tree.map(lambda label, x: None if label in frozen else x, labels, tree)


def merge(part: PyTree, rest: PyTree) -> PyTree:
  """Replace every None in `part` by the leaf of `rest` in the same place.

  Args:
    part: a pytree of arrays with None for frozen modules, as `learner.adapt_tasks` returns it.
    rest: a pytree of arrays, such as `state.phi`. It has the structure of `part`, with None counted
      as a leaf.

  Returns:
    The whole pytree.

  Raises:
    TypeError: an argument is not a pytree of arrays.
    ValueError: the structures differ.

  >>> merge({"body": None, "head": 3.0}, {"body": 1.0, "head": 2.0})
  {'body': 1.0, 'head': 3.0}
  """
  none = lambda x: x is None
  alike = jax.tree.structure(part, is_leaf=none) == jax.tree.structure(rest, is_leaf=none)
  if not alike or not all(isinstance(x, jax.Array) for x in jax.tree.leaves((part, rest))):
    _check_halves(part, rest, alike)
  return jax.tree.map(lambda x, y: y if x is None else x, part, rest, is_leaf=none)


def task_axes(part: PyTree, rest: PyTree) -> PyTree:
  """Return the in_axes of `jax.vmap` over the tasks of `merge(part, rest)`.

  Args:
    part: leaves [T, ...], with None for frozen modules, as `learner.adapt_tasks` returns it.
    rest: what the tasks share, such as `state.phi`.

  Returns:
    A tree like `rest`: 0 if the leaf has the axis T, None if the tasks share it.

  Raises:
    TypeError: an argument is not a pytree of arrays.
    ValueError: the structures differ.

  >>> import jax.numpy as jnp
  >>> thetas, phi = {"body": None, "head": jnp.arange(3.0)}, {"body": jnp.array(2.0), "head": 0.0}
  >>> f = jax.vmap(lambda theta: theta["body"] * theta["head"], (task_axes(thetas, phi),))
  >>> f(merge(thetas, phi)).tolist()
  [0.0, 2.0, 4.0]
  """
  merge(part, rest)  # the checks
  leaves, structure = jax.tree.flatten(part, is_leaf=lambda x: x is None)
  return structure.unflatten([None if leaf is None else 0 for leaf in leaves])


def _check_halves(part: PyTree, rest: PyTree, alike: bool) -> None:
  """Raise TypeError or ValueError unless both are pytrees of arrays with one structure."""
  for name, tree in (("part", part), ("rest", rest)):
    if tree is not None or not alike:  # None is valid if the whole pytree is a single array
      parameter_tree(name, tree)
  if not alike:
    raise ValueError(
      "part and rest must have one structure, with None for what part lacks; part is "
      f"{shown(part)}, rest is {shown(rest)}."
    )
