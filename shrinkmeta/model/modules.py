"""Modules: sets of parameters that share one shrinkage variance sigma_m^2.

Labels are a pytree of strings with the structure of the parameters, as for
`optax.multi_transform`. A quantity of each module, such as log sigma^2, is a dict {module: []}.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import parameter_tree, shown

PyTree = Any
Labels = Any  # a pytree of str with the structure of the parameters


def _label(params: PyTree, rule: Callable[[tuple[Any, ...]], str]) -> Labels:
  """Name the module of every leaf by its key path; the path of an nnx.Variable is its own."""
  parameter_tree("params", params)
  # Its leaves would all be called "value" (docs/hazards.md#nnx-variables).
  variable = lambda node: isinstance(node, nnx.Variable)

  def label(path: tuple[Any, ...], leaf: Any) -> Any:
    return jax.tree.map(lambda _: rule(path), leaf)

  return jax.tree_util.tree_map_with_path(label, params, is_leaf=variable)


def by_leaf(params: PyTree) -> Labels:
  """Make every array a module of its own, named by its path, such as "Conv_0/kernel".

  Args:
    params: a pytree of arrays [...], or of their shapes.

  Returns:
    Labels, a pytree of strings with the structure of params.

  Raises:
    TypeError: `params` holds something other than arrays.

  >>> by_leaf({"body": {"w": 1.0, "b": 0.0}})
  {'body': {'b': 'body/b', 'w': 'body/w'}}
  """
  return _label(params, validate.path_name)


def by_layer(params: PyTree) -> Labels:
  """Make every layer a module: the arrays with the same parent, such as kernel and bias.

  The parent's path names the module. An array without a parent is a module of its own.

  Args:
    params: a pytree of arrays [...], or of their shapes.

  Returns:
    Labels, a pytree of strings with the structure of params.

  Raises:
    TypeError: `params` holds something other than arrays.

  >>> by_layer({"body": {"w": 1.0, "b": 0.0}, "head": [2.0, 3.0]})
  {'body': {'b': 'body', 'w': 'body'}, 'head': ['head', 'head']}
  """
  return _label(params, lambda path: validate.path_name(path[:-1] or path))


def by_path(params: PyTree, rules: Mapping[str, str]) -> Labels:
  """Name the module of every array by the first rule that matches its path.

  Args:
    params: a pytree of arrays [...], or of their shapes.
    rules: {regular expression: module}, tried in order with `re.search` on paths such as
      "Conv_0/kernel". A last rule ".*" matches every path.

  Returns:
    Labels, a pytree of strings with the structure of params.

  Raises:
    TypeError: `params` holds something other than arrays, or `rules` is not a dict of strings.
    ValueError: a path that no rule matches, or a rule that is not a regular expression.

  >>> by_path({"conv": {"w": 1.0}, "out": {"w": 1.0}}, {"^out/": "head", ".*": "body"})
  {'conv': {'w': 'body'}, 'out': {'w': 'head'}}
  """
  validate.instance("rules", rules, Mapping, "a dict {regular expression: module}")
  for pattern, module in rules.items():
    validate.instance("a key of rules", pattern, str, "a regular expression")
    validate.instance(f"rules[{pattern!r}]", module, str, "a string, the name of a module")
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"rules: {pattern!r} is not a regular expression: {error}.") from error

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
  """Return the modules, sorted by path, with numbers inside a path compared as numbers.

  This is the order of the layers in the network only if their names sort in that order. "decoder"
  sorts before "encoder".

  Args:
    labels: a pytree of strings.

  Returns:
    The names of the modules, each once.

  Raises:
    TypeError: a label is not a string.

  >>> names({"layer_10": "layer_10", "layer_9": "layer_9"})
  ('layer_9', 'layer_10')
  """
  validate.labels("labels", labels)
  # Every second part is a number. ASCII digits alone: int() knows no superscripts.
  parts = lambda name: enumerate(re.split(r"([0-9]+)", name))
  natural = lambda name: [int(part) if i % 2 else part for i, part in parts(name)]
  paths = sorted(validate.leaves_with_names(labels), key=lambda item: natural(item[0]))
  return tuple(dict.fromkeys(label for _, label in paths))


def check_labels(labels: Labels, params: PyTree, name: str = "params") -> None:
  """Check that `labels` has one string for every array of `params`.

  Args:
    labels: what was passed for the labels.
    params: the parameters, a pytree of arrays [...].
    name: `params`, as the caller knows it.

  Raises:
    TypeError: a label is not a string, or the containers differ (a tuple for a list).
    ValueError: a path is in one of the two alone.
  """
  validate.labels("labels", labels)
  parameter_tree(name, params)
  make = "Make them with by_layer, by_leaf or by_path from these very parameters."
  have, want = dict(validate.leaves_with_names(labels)), dict(validate.leaves_with_names(params))
  if isinstance(labels, str) and set(want) != {""}:
    raise TypeError(
      f"labels must have the structure of the parameters; got the string {labels!r}. For one "
      f'module write sm.by_path(params, {{".*": {labels!r}}}).'
    )
  for path in [*want, *have]:
    if path not in have or path not in want:
      has, lacks = ("labels", name) if path in have else (name, "labels")
      raise ValueError(f"labels do not fit {name}: {path!r} is in {has} and not in {lacks}. {make}")
  if jax.tree.structure(labels) != jax.tree.structure(params):
    raise TypeError(
      f"labels do not fit {name}: the paths agree, the containers differ; labels is "
      f"{shown(labels)}, {name} is {shown(params)}. {make}"
    )


def check_parameters(
  name: str, phi: PyTree, sigma_name: str, log_sigma2: Mapping[str, Any], labels: Labels
) -> dict[str, np.ndarray | None]:
  """Check phi, labels and log sigma^2 against each other, and return what is known of log sigma^2.

  This runs at every call of a learner, so it makes a fast check first. Only if that fails does it
  run the slow checks that name the mistake.

  Args:
    name: phi, as the caller knows it.
    phi: the parameters, a pytree of floats of one dtype.
    sigma_name: log_sigma2, as the caller knows it.
    log_sigma2: {module: []}.
    labels: a pytree of strings with the structure of phi.

  Returns:
    {module: the value of log sigma^2, or None while it is traced}.

  Raises:
    TypeError, ValueError: see `check_labels`, `check_modules` and `validate.parameters`.
  """
  leaves, strings = jax.tree.leaves(phi), jax.tree.leaves(labels)
  plain = (
    jax.tree.structure(phi) == jax.tree.structure(labels)
    and all(isinstance(x, jax.Array) and x.dtype == leaves[0].dtype for x in leaves)
    and len(leaves) > 0
    and jnp.issubdtype(leaves[0].dtype, jnp.floating)
    and all(isinstance(s, str) for s in strings)
    and isinstance(log_sigma2, Mapping)
    and log_sigma2.keys() == set(strings)
    and all(isinstance(v, jax.Array) and v.ndim == 0 for v in log_sigma2.values())
  )
  if not plain:
    validate.parameters(name, phi)
    check_labels(labels, phi, name)
    check_modules(sigma_name, log_sigma2, labels)
  validate.finite(name, phi)
  known = {module: validate.known(value) for module, value in log_sigma2.items()}
  for module, value in known.items():
    if value is not None and value != value:
      raise ValueError(f"{sigma_name}[{module!r}] is NaN.")
  return known


def check_modules(name: str, values: Mapping[str, Any], labels: Labels) -> None:
  """Check that `values` is a dict with one number for each module.

  Args:
    name: the argument, as the caller knows it.
    values: what was passed, {module: []}.
    labels: a pytree of strings.

  Raises:
    TypeError: `values` is not a dict, or a value is not a number.
    ValueError: a module is missing or unknown, or a value is NaN or has a shape.
  """
  hint = f"Write {{{names(labels)[0]!r}: 0.0, ...}}, one number for each module."
  validate.instance(name, values, Mapping, "a dict {module: scalar}", hint)
  first = {label: path for path, label in reversed(validate.leaves_with_names(labels))}
  for module in first.keys() - values.keys():
    raise ValueError(
      f"{name} has no entry for module {module!r} (parameter {first[module]!r}); it has "
      f"{sorted(map(str, values))}. Give one number for each module of labels."
    )
  for module in values.keys() - first.keys():
    raise ValueError(
      f"{name} has an entry for {module!r}, which is no module; they are {names(labels)}."
    )
  for module, value in values.items():
    validate.array(f"{name}[{module!r}]", value, "a number")
    if jnp.ndim(value) != 0:
      raise ValueError(f"{name}[{module!r}] must be a scalar; its shape is {jnp.shape(value)}.")
    if (number := validate.known(value)) is not None and number != number:
      raise ValueError(f"{name}[{module!r}] is NaN.")


def module_names(name: str, value: Any, labels: Labels) -> tuple[str, ...]:
  """Return a collection of modules as a tuple, or raise an error.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.
    labels: a pytree of strings.

  Returns:
    The names.

  Raises:
    TypeError: `value` is not a collection of strings.
    ValueError: an entry is no module.

  >>> module_names("frozen", "head", {"w": "head"})
  Traceback (most recent call last):
  TypeError: frozen must be a tuple of modules, such as ('head',); got 'head'.
  """
  known = names(labels)
  found = value if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
  if not isinstance(found, tuple) or not all(isinstance(module, str) for module in found):
    raise TypeError(f"{name} must be a tuple of modules, such as {known[-1:]}; got {shown(value)}.")
  for module in found:
    if module not in known:
      raise ValueError(f"{name} has {module!r}, which is no module; the modules are {known}.")
  return found


def finite_sigma(log_sigma2: Mapping[str, Any], what: str) -> dict[str, jax.Array]:
  """Refuse modules without a prior, log sigma^2 = +inf: raise ValueError, or return NaN under jit.

  Args:
    log_sigma2: {module: []}.
    what: the name of the quantity that needs a prior on theta, for the message.

  Returns:
    {module: []}.
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
  """Give every leaf the value of its module.

  Args:
    values: {module: []}.
    labels: a pytree of strings with the structure of the parameters.

  Returns:
    A pytree of scalars with the structure of the parameters.

  >>> spread({"body": 1.0}, {"w": "body", "b": "body"})
  {'b': 1.0, 'w': 1.0}
  """
  return jax.tree.map(lambda label: values[label], labels)


def gather(tree: PyTree, labels: Labels) -> dict[str, jax.Array]:
  """Sum all entries of each module; this is the transpose of `spread`.

  Args:
    tree: a pytree of arrays [...] with the structure of labels.
    labels: a pytree of strings.

  Returns:
    {module: []}, sorted by name.

  >>> gather({"w": jnp.ones(3), "b": jnp.ones([])}, {"w": "body", "b": "body"})
  {'body': Array(4., dtype=float32)}
  """
  total: dict[str, jax.Array] = {}
  for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
    total[label] = total[label] + jnp.sum(leaf) if label in total else jnp.sum(leaf)
  return dict(sorted(total.items()))
