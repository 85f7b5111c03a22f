"""Modules: which parameters share one shrinkage variance.

Labels are a pytree of strings with the structure of the parameters, as for
`optax.multi_transform`. A quantity per module, such as log sigma^2, is a dict {module: scalar}.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from shrinkmeta import validate

PyTree = Any
Labels = Any  # a pytree of str with the structure of the parameters


def _label(params: PyTree, rule: Callable[[tuple[Any, ...]], str]) -> Labels:
  """Applies `rule` to the key path of every leaf; an nnx.Variable counts as a leaf."""
  variable = lambda node: isinstance(node, nnx.Variable)

  def label(path: tuple[Any, ...], leaf: Any) -> Any:
    return jax.tree.map(lambda _: rule(path), leaf)

  return jax.tree_util.tree_map_with_path(label, params, is_leaf=variable)


def by_leaf(params: PyTree) -> Labels:
  """Every array is a module of its own, named by its path, such as "Conv_0/kernel".

  >>> by_leaf({"body": {"w": 1.0, "b": 0.0}})
  {'body': {'b': 'body/b', 'w': 'body/w'}}
  """
  return _label(params, validate.path_name)


def by_layer(params: PyTree) -> Labels:
  """Arrays with one parent (kernel and bias of a layer) form a module named by the parent's path.

  An array without a parent is a module of its own.

  >>> by_layer({"body": {"w": 1.0, "b": 0.0}, "head": [2.0, 3.0]})
  {'body': {'b': 'body', 'w': 'body'}, 'head': ['head', 'head']}
  """
  return _label(params, lambda path: validate.path_name(path[:-1] or path))


def by_path(params: PyTree, rules: Mapping[str, str]) -> Labels:
  r"""The first rule {regex: module} that `re.search` finds in a leaf's path names its module.

  Args:
    params: the parameters.
    rules: tried in order; ".*" as the last one takes whatever is left.

  Raises:
    ValueError: a path that no rule matches.

  >>> by_path({"conv": {"w": 1.0}, "out": {"w": 1.0}}, {"^out/": "head", ".*": "body"})
  {'conv': {'w': 'body'}, 'out': {'w': 'head'}}
  """

  def rule(path: tuple[Any, ...]) -> str:
    name = validate.path_name(path)
    for pattern, module in rules.items():
      if re.search(pattern, name):
        return module
    raise ValueError(
      f"No rule matches the parameter {name!r}; the rules are {list(rules)}. Add a rule for it, or "
      'end with ".*".'
    )

  return _label(params, rule)


def names(labels: Labels) -> tuple[str, ...]:
  """The modules sorted by path, with numbers inside a path compared as numbers.

  With layers numbered or named in order that is the order of the network. It is not where names
  say otherwise, as of "decoder" and "encoder", and of a flax module's attributes.

  >>> names({"layer_10": "layer_10", "layer_9": "layer_9"})
  ('layer_9', 'layer_10')
  """
  natural = lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)]
  paths = sorted(validate.leaves_with_names(labels), key=lambda item: natural(item[0]))
  return tuple(dict.fromkeys(label for _, label in paths))


def check_labels(labels: Labels, params: PyTree) -> None:
  """Raises ValueError unless `labels` has a string for every array of `params` and no other."""
  have, want = dict(validate.leaves_with_names(labels)), dict(validate.leaves_with_names(params))
  for path in [*want, *have]:
    if path not in have or path not in want:
      has, lacks = ("labels", "the parameters") if path in have else ("the parameters", "labels")
      raise ValueError(
        f"labels do not fit the parameters: {path!r} is in {has} and not in {lacks}. Make them "
        "with by_layer, by_leaf or by_path from these very parameters."
      )
  for path, label in have.items():
    if not isinstance(label, str):
      raise ValueError(f"labels/{path} must be a string, the name of a module; got {label!r}.")


def check_modules(name: str, values: Mapping[str, Any], labels: Labels) -> None:
  """Raises ValueError unless `values` is a dict with one scalar for each module of `labels`."""
  if not isinstance(values, Mapping):
    raise ValueError(f"{name} must be a dict {{module: scalar}}; got {type(values)}.")
  first = {label: path for path, label in reversed(validate.leaves_with_names(labels))}
  for module in first.keys() - values.keys():
    raise ValueError(
      f"{name} has no entry for module {module!r} (parameter {first[module]!r}); it has "
      f"{sorted(values)}. Give one number for each module of labels."
    )
  for module in values.keys() - first.keys():
    raise ValueError(
      f"{name} has an entry for {module!r}, which is no module; they are {names(labels)}."
    )
  for module, value in values.items():
    if jnp.ndim(value) != 0:
      raise ValueError(f"{name}[{module!r}] must be a scalar; its shape is {jnp.shape(value)}.")
    if (number := validate.known(value)) is not None and number != number:
      raise ValueError(f"{name}[{module!r}] is NaN.")


def finite_sigma(log_sigma2: Mapping[str, Any], what: str) -> dict[str, jax.Array]:
  """log sigma^2, +inf being an error where it is known, and NaN where it is traced.

  Args:
    what: needs a prior on theta.
  """
  for module, value in log_sigma2.items():
    if (number := validate.known(value)) is not None and number == jnp.inf:
      raise ValueError(
        f"log_sigma2[{module!r}] is +inf: without a prior on theta there is no {what}. Give a "
        "finite sigma."
      )
  nan_where_free = lambda x: jnp.where(jnp.isposinf(x), jnp.nan, x)
  return {m: nan_where_free(jnp.asarray(value)) for m, value in log_sigma2.items()}


def spread(values: Mapping[str, Any], labels: Labels) -> PyTree:
  """{module: scalar} to a pytree of scalars with the structure of the parameters."""
  return jax.tree.map(lambda label: values[label], labels)


def gather(tree: PyTree, labels: Labels) -> dict[str, jax.Array]:
  """Sums all entries of `tree` module by module: the transpose of `spread`. Values []."""
  total: dict[str, jax.Array] = {}
  for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
    total[label] = total[label] + jnp.sum(leaf) if label in total else jnp.sum(leaf)
  return dict(sorted(total.items()))


class ModuleSummary(NamedTuple):
  """What one module is and does."""

  name: str
  size: int  # number of parameters
  sigma: float  # sigma_m: 0 is frozen, inf is free
  moved: float  # root mean square of theta - phi over entries and tasks; nan without thetas


def module_summary(
  labels: Labels, phi: PyTree, log_sigma2: Mapping[str, Any], thetas: PyTree | None = None
) -> tuple[ModuleSummary, ...]:
  """One row a module, in the order of `names`.

  Args:
    labels, phi, log_sigma2: as everywhere; concrete values (not for use under jit).
    thetas: adapted parameters, leaves with a leading axis T, or None; modules of which it has None,
      as `learner.adapt_tasks` returns them, did not move.
  """
  check_labels(labels, phi)
  check_modules("log_sigma2", log_sigma2, labels)
  sizes = gather(jax.tree.map(jnp.size, phi), labels)
  if thetas is None:
    moved = dict.fromkeys(sizes, jnp.nan)
  else:
    none = lambda x: x is None
    if jax.tree.structure(thetas, is_leaf=none) == jax.tree.structure(phi):
      fill = lambda t, p: jnp.asarray(p)[None] if t is None else t
      thetas = jax.tree.map(fill, thetas, phi, is_leaf=none)
    validate.same_shapes("thetas", thetas, "phi", phi, lead=1)
    square = gather(jax.tree.map(lambda t, p: jnp.mean(jnp.square(t - p), 0), thetas, phi), labels)
    moved = {m: jnp.sqrt(square[m] / sizes[m]) for m in sizes}
  return tuple(
    ModuleSummary(m, int(sizes[m]), float(jnp.exp(0.5 * log_sigma2[m])), float(moved[m]))
    for m in names(labels)
  )


def format_summary(rows: tuple[ModuleSummary, ...]) -> str:
  """The rows of `module_summary` as a plain-text table.

  >>> rows = ModuleSummary("body", 90, 0.0, 0.0), ModuleSummary("head", 10, 0.5, 0.3)
  >>> print(format_summary(rows))
  module  parameters  sigma  rms(theta - phi)
  body            90      0                 0
  head            10    0.5               0.3
  """
  head = ("module", "parameters", "sigma", "rms(theta - phi)")
  cells = [head, *((r.name, str(r.size), f"{r.sigma:.3g}", f"{r.moved:.3g}") for r in rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(4)]
  line = lambda row: "  ".join(
    [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
  )
  return "\n".join(line(row) for row in cells)
