"""Modules: sets of parameters that share one shrinkage variance sigma_m^2.

Labels say which module every parameter belongs to. They are a pytree of strings with the structure
of the parameters, as for `optax.multi_transform`. A quantity with one value for each module, such
as log sigma^2, is a dict {module: []}.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import is_nnx_variable, parameter_tree, shown

PyTree = Any
Labels = Any  # The module of every parameter: a pytree of strings with the structure of phi.


def _label(params: PyTree, rule: Callable[[tuple[Any, ...]], str]) -> Labels:
  """Return labels in which `rule` turns the key path of a leaf into the name of its module."""
  parameter_tree("params", params)
  # An nnx.Variable counts as a leaf. Otherwise every path would end in "value"
  # (docs/hazards.md#nnx-variables).

  def label(path: tuple[Any, ...], leaf: Any) -> Any:
    return jax.tree.map(lambda _: rule(path), leaf)

  return jax.tree_util.tree_map_with_path(label, params, is_leaf=is_nnx_variable)


def by_leaf(params: PyTree) -> Labels:
  """Return labels in which every array is a module of its own.

  The name of a module is the path of its array, such as "Conv_0/kernel".

  Args:
    params: the parameters, a pytree of arrays [...] or of jax.ShapeDtypeStructs.

  Returns:
    Labels, a pytree of strings with the structure of params.

  Raises:
    TypeError: if `params` holds something other than arrays.

  >>> by_leaf({"body": {"w": 1.0, "b": 0.0}})
  {'body': {'b': 'body/b', 'w': 'body/w'}}
  """
  return _label(params, validate.path_name)


def by_layer(params: PyTree) -> Labels:
  """Return labels in which every layer is a module.

  A layer is the set of arrays with the same parent in the pytree, such as a kernel and a bias. The
  name of the module is the path of the parent. An array without a parent is a module of its own.

  Args:
    params: the parameters, a pytree of arrays [...] or of jax.ShapeDtypeStructs.

  Returns:
    Labels, a pytree of strings with the structure of params.

  Raises:
    TypeError: if `params` holds something other than arrays.

  >>> by_layer({"body": {"w": 1.0, "b": 0.0}, "head": [2.0, 3.0]})
  {'body': {'b': 'body', 'w': 'body'}, 'head': ['head', 'head']}
  """
  return _label(params, lambda path: validate.path_name(path[:-1] or path))


def by_path(params: PyTree, rules: Mapping[str, str]) -> Labels:
  """Return labels in which the first rule that matches an array's path names its module.

  Args:
    params: the parameters, a pytree of arrays [...] or of jax.ShapeDtypeStructs.
    rules: {regular expression: module}. `re.search` tries the rules in order on paths such as
      "Conv_0/kernel". A last rule ".*" matches every path.

  Returns:
    Labels, a pytree of strings with the structure of params.

  Raises:
    TypeError: if `params` holds something other than arrays, or `rules` is not a dict of strings.
    ValueError: if no rule matches a path, or a rule is not a regular expression.

  >>> by_path({"conv": {"w": 1.0}, "out": {"w": 1.0}}, {"^out/": "head", ".*": "body"})
  {'conv': {'w': 'body'}, 'out': {'w': 'head'}}
  """
  validate.instance("rules", rules, Mapping, "a dict {regular expression: module}")
  for pattern, module in rules.items():
    scalars.regex("a key of rules", pattern)
    validate.instance(f"rules[{pattern!r}]", module, str, "a string, the name of a module")

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
  """Return the names of the modules, sorted by the paths of their parameters.

  Numbers inside a path are compared as numbers. The result is not always the order of the layers in
  the network: "decoder" sorts before "encoder".

  Args:
    labels: a pytree of strings.

  Returns:
    The names of the modules, each once.

  Raises:
    TypeError: if a label is not a string.

  >>> names({"layer_10": "layer_10", "layer_9": "layer_9"})
  ('layer_9', 'layer_10')
  """
  validate.labels("labels", labels)
  # Every second part is a number, written in ASCII digits.
  parts = lambda name: enumerate(re.split(r"([0-9]+)", name))
  natural = lambda name: [int(part) if i % 2 else part for i, part in parts(name)]
  paths = sorted(validate.leaves_with_names(labels), key=lambda item: natural(item[0]))
  return tuple(dict.fromkeys(label for _, label in paths))


def check_labels(labels: Labels, params: PyTree, name: str = "params") -> None:
  """Check that `labels` has one string for every array of `params`.

  Args:
    labels: the labels that the caller passed.
    params: the parameters, a pytree of arrays [...].
    name: the name of `params`, for the error message.

  Raises:
    TypeError: if a label is not a string, or if the containers differ, such as a tuple and a list.
    ValueError: if a path is in only one of the two pytrees.
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
      f"{shown(labels)}, {name} is {shown(params)}. Write the labels in the containers of {name}, "
      "with one string for each array, as by_layer, by_leaf and by_path do."
    )


def check_parameters(
  name: str, phi: PyTree, sigma_name: str, log_sigma2: Mapping[str, Any], labels: Labels
) -> dict[str, np.ndarray | None]:
  """Check that phi, labels and log sigma^2 fit each other, and return the known log sigma^2.

  The functions of a learner call this function at every call of their own. So it first makes a fast
  check of types and structures. Only if this check fails does it run the slow checks, whose errors
  name the mistake.

  Args:
    name: the name of phi, for the error message.
    phi: the parameters, a pytree of floats of one dtype.
    sigma_name: the name of log_sigma2, for the error message.
    log_sigma2: {module: []}.
    labels: the module of every leaf, a pytree of strings with the structure of phi.

  Returns:
    {module: the value of log sigma^2, or None if the value is traced}.

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
    name: the name of the argument, for the error message.
    values: the value of the argument, {module: []}.
    labels: a pytree of strings.

  Raises:
    TypeError: if `values` is not a dict, or a value is not a number.
    ValueError: if a module is missing or unknown, or a value is NaN or not a scalar.
  """
  hint = f"Write {{{names(labels)[0]!r}: 0.0, ...}}, one number for each module."
  validate.instance(name, values, Mapping, "a dict {module: scalar}", hint)
  first = {label: path for path, label in reversed(validate.leaves_with_names(labels))}
  for module in values.keys() - first.keys():  # first: a misspelt name is also a missing entry
    raise ValueError(
      f"{name} has an entry for {module!r}, which is no module; they are {names(labels)}."
    )
  for module in first.keys() - values.keys():
    raise ValueError(
      f"{name} has no entry for module {module!r} (parameter {first[module]!r}); it has "
      f"{sorted(map(str, values))}. Give one number for each module of labels."
    )
  for module, value in values.items():
    validate.array(f"{name}[{module!r}]", value, "a number")
    if jnp.ndim(value) != 0:
      raise ValueError(f"{name}[{module!r}] must be a scalar; its shape is {jnp.shape(value)}.")
    if (number := validate.known(value)) is not None and number != number:
      raise ValueError(f"{name}[{module!r}] is NaN.")


def module_names(name: str, value: Any, labels: Labels) -> tuple[str, ...]:
  """Return a collection of module names as a tuple, or raise an error.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument.
    labels: a pytree of strings.

  Returns:
    The names, in the order in which they were passed.

  Raises:
    TypeError: if `value` is not a collection of strings.
    ValueError: if an entry is not the name of a module.

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
  """Return log sigma^2, or raise an error if a module has no prior, log sigma^2 = +inf.

  Args:
    log_sigma2: {module: []}.
    what: the name of the quantity that needs a prior on theta, for the error message.

  Returns:
    {module: []}. Under jit, where no value is known, +inf becomes NaN.

  Raises:
    ValueError: if a known log sigma^2 is +inf.
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
  """Return a pytree in which every leaf is the value of its module.

  Args:
    values: {module: []}.
    labels: the module of every leaf, a pytree of strings.

  Returns:
    A pytree of scalars with the structure of labels.

  >>> spread({"body": 1.0}, {"w": "body", "b": "body"})
  {'b': 1.0, 'w': 1.0}
  """
  return jax.tree.map(lambda label: values[label], labels)


def gather(tree: PyTree, labels: Labels) -> dict[str, jax.Array]:
  """Return the sum of all entries of each module.

  Args:
    tree: a pytree of arrays [...] with the structure of labels.
    labels: the module of every leaf, a pytree of strings.

  Returns:
    {module: []}, sorted by the name of the module.

  >>> gather({"w": jnp.ones(3), "b": jnp.ones([])}, {"w": "body", "b": "body"})
  {'body': Array(4., dtype=float32)}
  """
  total: dict[str, jax.Array] = {}
  for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
    total[label] = total[label] + jnp.sum(leaf) if label in total else jnp.sum(leaf)
  return dict(sorted(total.items()))


def module_sizes(tree: PyTree, labels: Labels) -> dict[str, int]:
  """Return the number of entries of each module, {module: size}, sorted by the name of the module.

  >>> module_sizes({"w": jnp.ones(3), "b": jnp.ones([])}, {"w": "body", "b": "body"})
  {'body': 4}
  """
  total = dict.fromkeys(sorted(jax.tree.leaves(labels)), 0)  # integers of Python do not overflow
  for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(tree), strict=True):
    total[label] += math.prod(jnp.shape(leaf))
  return total
