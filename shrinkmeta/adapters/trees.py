"""Trees of adapters: dicts nested by the path of a kernel, with {"A": ..., "B": ...} at the end."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.adapters.low_rank import RANK, LowRank, axes_of, labels_of
from shrinkmeta.adapters.rewrite import Row
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import is_nnx_variable

PyTree = Any
Adapters = dict[str, Any]

_BIAS = {"kernel": "bias", "w": "b"}  # {name of a kernel: the bias beside it}, flax and haiku
_LAYER = re.compile(r"\[(\d+)\]")


def named_leaves(params: PyTree) -> list[tuple[str, Any]]:
  """Return [(path, leaf)] in the order of `jax.tree.leaves`. nnx.Variables add no key to a path."""
  named = []
  for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_nnx_variable):
    inner = jax.tree_util.tree_leaves_with_path(node)
    for more, leaf in inner:
      named.append((validate.path_name(path if len(inner) == 1 else (*path, *more)), leaf))
  if len({name for name, _ in named}) < len(named):
    validate.leaves_with_names(params)  # raises and names the path
  return named


def may_be_stack(path: str, named: Mapping[str, Any]) -> bool:
  """Return whether a kernel with three axes may be a stack [layers, in, out].

  A kernel with more layers than inputs is rather one of attention, [in, heads, size]. A bias beside
  a stack has the same first axis; the bias of attention's [heads, size, out] has only the last one.

  Args:
    path: the path of the kernel.
    named: {path: leaf} for all parameters.
  """
  layers, inputs, _ = jnp.shape(named[path])
  folder, name = path[: path.rfind("/") + 1], path[path.rfind("/") + 1 :]
  bias = jnp.shape(named.get(folder + _BIAS.get(name, ""), 0.0))  # () if there is none
  return layers <= inputs and bias[:1] in ((), (layers,))


def kernels(
  adapters: Any, wanted: tuple[str, ...] = (), name: str = "adapters"
) -> list[tuple[str, dict[str, Any]]]:
  """Return [(path of a kernel, {"A": array, "B": array})] for a tree of adapters.

  Args:
    adapters: adapters from `init`, or a tree that a function of this file made from them.
    wanted: the keys that each kernel must have: "A", "B" or both. () accepts a kernel that has only
      one.
    name: the name of the argument, for error messages.

  Raises:
    TypeError: `adapters` is not a nested dict.
    ValueError: a kernel lacks a key of `wanted`, or has None in the place of an array.
  """
  found: list[tuple[str, dict[str, Any]]] = []

  def visit(node: Any, path: str) -> None:
    if is_kernel(node):
      if lacking := [letter for letter in wanted if letter not in node]:
        raise ValueError(
          f"{name}: the kernel {path!r} has no {lacking[0]!r}; it has {sorted(node)}. Put the "
          "trees of lora.hold_A together by lora.join, or pass lora.Base(params, A) as constants."
        )
      if empty := [letter for letter, array in node.items() if array is None]:
        raise ValueError(
          f"{name}: {empty[0]!r} of the kernel {path!r} is None, as adaptation returns it for a "
          "frozen module. Fill it with phi: sm.merge(thetas, state.phi)."
        )
      found.append((path, dict(node)))
    elif isinstance(node, Mapping) and node:
      for key, value in node.items():
        visit(value, f"{path}/{key}" if path else str(key))
    else:
      raise TypeError(
        f'{name} must be a dict nested by path, with {{"A": array, "B": array}} for each kernel, '
        f"as lora.init makes it; got {type(node).__name__} at {path!r}."
      )

  visit(adapters, "")
  return found


def is_kernel(node: Any) -> bool:
  """Return whether `node` holds the arrays A and B of one kernel, or one of the two."""
  return (
    isinstance(node, Mapping)
    and bool(node)
    and set(node) <= {"A", "B"}
    and not any(isinstance(x, Mapping) for x in node.values())
  )


def labels(adapters: Adapters, train_A: bool = True) -> PyTree:
  """Make labels with one module for each adapted kernel, named after the path of the kernel.

  Args:
    adapters: adapters from `init`, `split_layers` or `hold_A`.
    train_A: True puts A and B of a kernel into one module. False puts every A into the module "A"
      and each B into the module of its kernel. Give the module "A" sigma = 0.

  Returns:
    A pytree of strings with the structure of `adapters`.

  Raises:
    ValueError: train_A is False, and the path of a kernel is "A".

  >>> labels({"dense": {"kernel": {"A": 0.0, "B": 0.0}}}, train_A=False)
  {'dense': {'kernel': {'A': 'A', 'B': 'dense/kernel'}}}
  """
  train_A = scalars.flag("train_A", train_A)
  if not train_A and "A" in (path for path, _ in kernels(adapters)):
    raise ValueError('"A" is the module of every A, but a kernel has this path too: rename it.')
  kernels(adapters)
  name = lambda path: validate.path_name(path[:-1])
  label = lambda path, _: "A" if path[-1].key == "A" and not train_A else name(path)
  return jax.tree_util.tree_map_with_path(label, adapters)


def hold_A(adapters: Adapters) -> tuple[Adapters, Adapters]:
  """Split adapters into the B's, which tasks adapt, and the A's, which become constants.

  Args:
    adapters: adapters from `init`, with A and B for each kernel.

  Returns:
    (B, A): two trees like `adapters`, with {"B": ...} and {"A": ...} for each kernel. Call an
    attached network as predict(B, inputs, Base(params, A)).

  >>> hold_A({"dense": {"A": 1.0, "B": 2.0}})
  ({'dense': {'B': 2.0}}, {'dense': {'A': 1.0}})
  """
  kernels(adapters, wanted=("A", "B"))
  return _only(adapters, "B"), _only(adapters, "A")


def join(first: Adapters, second: Adapters) -> Adapters:
  """Join the two trees that `hold_A` returned.

  Args:
    first: one of the trees.
    second: the other.

  Returns:
    Adapters with A and B for each kernel.

  Raises:
    TypeError: an argument is not a tree of adapters.
    ValueError: both trees have an array at one path.

  >>> join({"dense": {"B": 2.0}}, {"dense": {"A": 1.0}})
  {'dense': {'B': 2.0, 'A': 1.0}}
  """
  kernels(first, name="first")
  kernels(second, name="second")
  return _joined(first, second)


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Adapters:
  """Join two trees that `join` has checked."""
  both = dict(first)
  for key, value in second.items():
    if key not in both:
      both[key] = value
    elif isinstance(both[key], Mapping) and isinstance(value, Mapping):
      both[key] = _joined(both[key], value)
    else:
      raise ValueError(
        f"Both trees of adapters have {key!r}: expected B in one and A in the other."
      )
  return both


def _only(adapters: Mapping[str, Any], letter: str) -> Adapters:
  if is_kernel(adapters):
    return {letter: adapters[letter]}
  return {key: _only(value, letter) for key, value in adapters.items()}


def split_layers(adapters: Adapters, paths: str = ".*") -> Adapters:
  """Give each layer of a stacked kernel its own A and B, so that each layer can have its own sigma.

  Args:
    adapters: adapters from `init`.
    paths: a regular expression, which `re.search` looks for in the paths of the kernels. A kernel
      that it finds is split if its A and its B have at least 3 axes. A kernel without layers can
      have such an A and B, for example one with axes "iioo". Choose an expression that does not
      find it.

  Returns:
    The adapters, with {"[0]": {"A", "B"}, "[1]": ...} instead of {"A", "B"}. `attach` and `merge`
    take both forms. `labels` and `sm.by_layer` make one module for each layer, for example
    "layers/kernel/[0]".

  >>> import jax.numpy as jnp
  >>> split = split_layers({"kernel": {"A": jnp.ones([2, 5, 1]), "B": jnp.ones([2, 1, 3])}})
  >>> sorted(split["kernel"]), split["kernel"]["[1]"]["A"].shape
  (['[0]', '[1]'], (5, 1))
  """

  def visit(node: Mapping[str, Any], path: str) -> Adapters:
    if not is_kernel(node):
      return {k: visit(v, f"{path}/{k}" if path else k) for k, v in node.items()}
    if min(jnp.ndim(x) for x in node.values()) < 3 or not re.search(paths, path):
      return dict(node)
    layers = range(len(node["A"]))
    return {f"[{n}]": {k: x[n] for k, x in node.items()} for n in layers}

  scalars.regex("paths", paths)
  kernels(adapters, wanted=("A", "B"))
  return visit(adapters, "")


def stack_layers(adapters: Adapters) -> Adapters:
  """Undo `split_layers`: make one A [layers, in, r] and one B [layers, r, out] for each kernel.

  Args:
    adapters: adapters from `split_layers` or from `init`.

  Returns:
    The adapters, with {"A", "B"} instead of {"[0]": {"A", "B"}, "[1]": ...}.

  Raises:
    ValueError: the layers of a kernel are not numbered 0, 1, ... without a gap, or differ in rank.

  >>> import jax.numpy as jnp
  >>> one = {"A": jnp.ones([5, 1]), "B": jnp.ones([1, 3])}
  >>> stack_layers({"kernel": {"[0]": one, "[1]": one}})["kernel"]["B"].shape
  (2, 1, 3)
  """
  kernels(adapters)
  return _stacked(adapters, "")


def _stacked(adapters: Mapping[str, Any], path: str) -> Adapters:
  """Stack the layers of adapters that `stack_layers` has checked."""
  if is_kernel(adapters):
    return dict(adapters)
  numbers = [int(m[1]) for m in map(_LAYER.fullmatch, adapters) if m]
  if not numbers or len(numbers) < len(adapters):
    return {k: _stacked(v, f"{path}/{k}" if path else k) for k, v in adapters.items()}
  if sorted(numbers) != list(range(len(numbers))):
    raise ValueError(
      f"A stacked kernel has adapters for the layers {sorted(numbers)}; expected every layer from "
      "0 on. Give a layer without an update B = 0."
    )
  in_order = [adapters[f"[{n}]"] for n in range(len(numbers))]
  for letter in in_order[0]:
    if len(shapes := {jnp.shape(layer[letter]) for layer in in_order}) > 1:
      raise ValueError(
        f"The layers of the stacked kernel {path!r} have {letter!r} of shapes {sorted(shapes)}; "
        "expected one shape. For several ranks, fill A and B of the lower ones up with zeros."
      )
  return jax.tree.map(lambda *xs: jnp.stack(xs), *in_order)


def updates(
  argument: str, params: PyTree, adapters: Adapters, alpha: float | None, rows: Any = None
) -> dict[int, LowRank]:
  """Return {position among the leaves of params: the kernel with its factors}.

  Args:
    argument: the name of `params`, for error messages.
    params: the network's parameters.
    adapters: A and B for each kernel.
    alpha: as for `lora.attach`.
    rows: (tables, t) if the adapters are the rows t of tables [T, ...], or None.

  Raises:
    ValueError: adapters do not fit the parameters.
  """
  places = {path: (n, leaf) for n, (path, leaf) in enumerate(named_leaves(params))}
  tables, task = rows or ((), None)
  tables = dict(named_leaves(tables))
  found = {}
  for path, factors in kernels(adapters):
    if path not in places:
      raise ValueError(
        f"adapters have a kernel {path!r}, which {argument} lack. The paths of {argument} are "
        f"{list(places)}. Make adapters by lora.init from these very parameters."
      )
    place, leaf = places[path]
    own = [tables.get(f"{path}/{letter}") for letter in "AB"]
    found[place] = _low_rank(path, jnp.asarray(leaf), factors["A"], factors["B"], alpha, own, task)
  return found


def _low_rank(
  path: str, kernel: Any, a: Any, b: Any, alpha: float | None, tables: list[Any], task: Any
) -> LowRank:
  """Return the kernel with A and B; `tables` are those of which A and B are the rows `task`."""
  shapes = jnp.shape(a), jnp.shape(b)
  layers = max(0, len(shapes[0]) + len(shapes[1]) - 2 - kernel.ndim)
  axes = axes_of(*shapes, layers)
  of_a, of_b = labels_of(axes)
  rank = shapes[0][of_a.index(RANK)]
  fits = len(axes) == kernel.ndim and all(
    shape == tuple(rank if n == RANK else kernel.shape[n] for n in of)
    for shape, of in zip(shapes, (of_a, of_b), strict=True)
  )
  if not fits:
    raise ValueError(
      f"adapters: {path}/A {shapes[0]} and {path}/B {shapes[1]} do not fit the kernel of shape "
      f"{kernel.shape}. Make them by lora.init; for the adapters of T tasks use jax.vmap."
    )
  a, b = jnp.asarray(a), jnp.asarray(b)
  scale = None if alpha is None else jnp.asarray(alpha / rank, b.dtype)
  b = b if scale is None else b * scale
  rows = tuple(
    None if table is None else Row(jnp.asarray(table), task, by)
    for table, by in zip(tables, (None, scale), strict=True)
  )
  return LowRank(kernel, a, b, of_a, of_b, path, rows)
