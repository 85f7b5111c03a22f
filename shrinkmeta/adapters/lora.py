r"""Low-rank adapters of a frozen network, which change each kernel W to W + (alpha / r) A B.

A kernel W [in, out] gets A [in, r] and B [r, out]. The network's own parameters are constants: they
are neither adapted nor trained, and no task has a copy of them. B = 0 at the start, so the adapted
network begins as the base network.

**Which sigma is identified.** The product A B stays the same when A becomes c A and B becomes
B / c. So the data determine the scale of A B, but not the scale of A or of B alone, and a sigma for
each of them is not identified. `init` draws A with orthonormal columns. The recommended
parametrisation keeps A at this draw. Only B is task-specific, with the prior
B ~ N(phi_B, sigma^2 I). The update Delta W = (alpha / r) A B is then linear in B, and
|Delta W|_F = (alpha / r) |B|_F. The entries of B are the update's coordinates in an orthonormal
basis, in units of alpha / r. Each entry has the prior variance sigma^2, for kernels of every size.
So sigma can be compared between adapters that have the same alpha / r. There are three choices:

- `hold_A(adapters)` makes A part of the constants. Only B has a phi and a sigma.
- `labels(adapters, train_A=False)` puts every A into one module, "A". Set its sigma to 0. All tasks
  then share A, and an algorithm that learns phi learns it.
- `labels(adapters, train_A=True)` makes A and B of a kernel one module. A task can then choose its
  own subspace, but sigma measures the factors and not the update.

References: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.adapters import low_rank, rewrite, trees
from shrinkmeta.adapters.trees import Adapters, hold_A, join, labels, split_layers, stack_layers
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import parameter_tree, shown
from shrinkmeta.curvature.one_by_one import one_by_one

PyTree = Any
Predict = Callable[[PyTree, PyTree], PyTree]

_BY_RANK = {2: "io", 3: "lio", 4: "iiio"}  # {number of axes of a kernel: their default kinds}


class Base(NamedTuple):
  """Constants of an adapted network whose A is fixed."""

  params: PyTree  # the network's own parameters
  A: Adapters  # {"A": ...} for every adapted kernel, from `hold_A`


def init(
  key: jax.Array,
  params: PyTree,
  rules: Mapping[str, int | tuple[int, str]],
  dtype: jax.typing.DTypeLike | None = None,
) -> Adapters:
  r"""Draw adapters for the kernels that `rules` choose: A with orthonormal columns, B = 0.

  Args:
    key: the random key from which every A is drawn.
    params: the network's parameters: any pytree of arrays, flax.nnx.State included.
    rules: {regex: rank}. The first regex that `re.search` finds in a path, such as
      "params/dense_0/kernel", chooses the kernel and its rank. A kernel with 2 axes is [in, out].
      With 3 axes it is a stack of layers [layers, in, out], with 4 axes a convolution's
      [height, width, in, out]. For other layouts give (rank, axes). `axes` has a letter for each
      axis: "l" layers, "i" input side, "o" output side. Examples: (4, "oi") for equinox's
      [out, in], (4, "iio") for a convolution [width, in, out], (4, "ioo") for [in, heads, size].
      A rank alone is refused for a kernel with 3 axes if the first is longer than the second, or if
      the bias beside the kernel has another first axis.
    dtype: the dtype of A and B. None takes the dtype of the kernel.

  Returns:
    A dict nested like the paths of the kernels, with {"A": A, "B": B} at the end of each path. A is
    [in, r] and B is [r, out], where in and out stand for all axes of a side. So a convolution has A
    [height, width, in, r]. A stack has A [layers, in, r] and B [layers, r, out]. A kernel with the
    output first has A [r, in] and B [out, r]. `sm.by_layer` makes one module for each kernel.

  Raises:
    TypeError: `rules` is not a dict.
    ValueError: a rule adapts no kernel, finds a leaf that is not a kernel (a bias, integers), or
      asks for a rank above a side of the kernel, or for one with which A and B fit two layouts.

  >>> import jax, jax.numpy as jnp
  >>> params = {"dense": {"kernel": jnp.ones([5, 3]), "bias": jnp.zeros([3])}}
  >>> adapters = init(jax.random.key(0), params, {"kernel$": 2})
  >>> jax.tree.map(jnp.shape, adapters)
  {'dense': {'kernel': {'A': (5, 2), 'B': (2, 3)}}}
  """
  scalars.key("key", key, optional=False)
  parameter_tree("params", params)
  if not isinstance(rules, Mapping) or not rules:
    raise TypeError(f"rules must be a dict {{regex of a kernel's path: rank}}; got {shown(rules)}.")
  for pattern in rules:
    scalars.regex("a key of rules", pattern)
  dtype = None if dtype is None else scalars.floating_dtype("dtype", dtype)
  chosen: dict[str, tuple[Any, int, str]] = {}
  found, hits, named = set(), set(), dict(trees.named_leaves(params))
  for path, leaf in named.items():
    matches = [pattern for pattern in rules if re.search(pattern, path)]
    found |= set(matches)
    if matches:
      hits.add(matches[0])
      chosen[path] = leaf, *_rank_and_axes(matches[0], rules[matches[0]], path, named)
  if idle := [pattern for pattern in rules if pattern not in hits]:
    why = "finds only paths that earlier rules take" if idle[0] in found else "finds no path"
    raise ValueError(f"rules has {idle[0]!r}, which {why}. The paths of params are {list(named)}.")
  adapters: Adapters = {}
  keys = jax.random.split(key, len(chosen))
  for one, (path, (leaf, rank, axes)) in zip(keys, chosen.items(), strict=True):
    node = adapters
    for part in path.split("/"):
      node = node.setdefault(part, {})
    drawn = _draw(one, leaf.shape, rank, axes, leaf.dtype if dtype is None else dtype)
    a, b = drawn["A"].shape, drawn["B"].shape
    if (read := low_rank.axes_of(a, b, axes.count("l"))) != axes:
      raise ValueError(
        f"The kernel {path!r} of shape {leaf.shape} and axes {axes!r} would get A {a} and B {b}. "
        f"They also fit the axes {read!r}. Choose another rank than {rank}."
      )
    node |= drawn
  return adapters


def _rank_and_axes(pattern: str, rule: Any, path: str, named: dict) -> tuple[int, str]:
  """Check a rule against the leaf that it chose; return the rank and the kinds of the axes."""
  rank, axes = rule if isinstance(rule, tuple) and len(rule) == 2 else (rule, None)
  leaf, shape = named[path], jnp.shape(named[path])
  if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 1:
    raise ValueError(f"rules[{pattern!r}] must be a rank >= 1 or (rank, axes); got {rule!r}.")
  if len(shape) < 2 or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
    raise ValueError(
      f"The rule {pattern!r} finds {path!r}, which is no kernel: its shape is {shape} and its "
      f'dtype {jnp.result_type(leaf)}. Narrow the rule, for example with "kernel$".'
    )
  axes = _BY_RANK.get(len(shape)) if axes is None else axes
  text = isinstance(axes, str)
  if not text or not re.fullmatch("l*(i+o+|o+i+)", axes) or len(axes) != len(shape):
    raise ValueError(
      f"rules[{pattern!r}]: the kernel {path!r} has shape {shape}. Give (rank, axes) with one "
      f'letter for each axis: "l" for layers first, then "i" and "o" for the sides; got {axes!r}.'
    )
  if not isinstance(rule, tuple) and len(shape) == 3 and not trees.may_be_stack(path, named):
    raise ValueError(
      f"rules[{pattern!r}]: by its rank alone the kernel {path!r} of shape {shape} is a stack of "
      f'{shape[0]} layers with {shape[1]} inputs each. If it is one, give ({rank}, "lio"). In '
      f'attention [in, heads, size] needs ({rank}, "ioo") and [heads, size, out] ({rank}, "iio").'
    )
  sizes = {c: math.prod(s for s, x in zip(shape, axes, strict=True) if x == c) for c in "io"}
  if rank > min(sizes.values()):
    raise ValueError(
      f"rules[{pattern!r}] wants rank {rank}, but the kernel {path!r} of shape {shape} has "
      f"{sizes['i']} inputs and {sizes['o']} outputs. Choose a rank of at most "
      f"{min(sizes.values())}."
    )
  return int(rank), axes


def _draw(
  key: jax.Array, shape: tuple[int, ...], rank: int, axes: str, dtype: Any
) -> dict[str, jax.Array]:
  """Draw A with orthonormal columns, uniformly and for each layer, and make B = 0."""
  layers = shape[: axes.count("l")]
  side = lambda kind: tuple(s for s, c in zip(shape, axes, strict=True) if c == kind)
  wide = jnp.promote_types(dtype, jnp.float32)  # in 8 bits the columns are not orthonormal
  normal = jax.random.normal(key, (math.prod(layers), math.prod(side("i")), rank), wide)
  q, r = jax.vmap(one_by_one(lambda x: tuple(jnp.linalg.qr(x))))(normal)
  a = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]  # makes the draw uniform
  a = a.reshape(*layers, *side("i"), rank).astype(dtype)
  b = jnp.zeros([*layers, rank, *side("o")], dtype)
  if axes.rfind("i") > axes.rfind("o"):
    a, b = jnp.moveaxis(a, -1, len(layers)), jnp.moveaxis(b, len(layers), -1)
  return {"A": a, "B": b}


def attach(predict: Predict, alpha: float | None = None) -> "Attached":
  """Add adapters to a network, without ever forming W + (alpha / r) A B.

      x W  ->  x W + (alpha / r) (x A) B

  `attach` traces the network at its parameters and runs the traced program, in which it rewrites
  each product with an adapted kernel. So `predict` may come from flax.linen, flax.nnx, equinox or
  haiku, or be a plain function. Before the product the network may transpose, reshape, slice,
  split, reverse or cast the kernel, and add axes of size 1. It may pass the kernel into jit, remat,
  scan (also as one of the xs), while and cond, and into a function with a custom derivative. Such a
  function loses its custom rule: JAX differentiates the rewritten body.

  Under vmap over T adapters no [T, in, out] array exists, with one exception: JAX makes one if a
  cond or the index of a layer depends on the task's adapters. The outputs have derivatives of any
  order in adapters and inputs. With B = 0 they equal the outputs of the base network. Outside jit
  and loops the two are equal to the bit. Under jit and in loops the compiler orders the sums, and
  the two agree up to rounding (1e-6 in float32).

  The adapted function has no keyword `key`. If the network has dropout, write one that has:
  `lambda a, x, c, key=None: attach(lambda p, x: net(p, x, key))(a, x, c)`.

  The products with A and B use the wider dtype of the two operands. If the network casts a kernel
  before a product, A and B are cast too. The outputs keep the network's dtype.

  Args:
    predict: (params, inputs) -> outputs, a function of arrays.
    alpha: the update A B is scaled by alpha / r. None means alpha = r.

  Returns:
    predict(adapters, inputs, constants) -> outputs. `constants` are the network's parameters, or
    `Base(params, A)` if adapters hold B only. The function raises ValueError if an adapted kernel
    enters another operation (a lookup of rows, an elementwise product) or no product at all. It
    also raises ValueError if adapters do not fit the constants. The error names the kernel.

  Raises:
    TypeError: `predict` is not a function.

  >>> import jax, jax.numpy as jnp
  >>> predict = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.eye(2)}
  >>> adapters = {"kernel": {"A": jnp.ones([2, 1]), "B": jnp.array([[1.0, 2.0]])}}
  >>> attach(predict)(adapters, jnp.array([1.0, 1.0]), params).tolist()
  [3.0, 5.0]
  """
  validate.function("predict", predict, "(params, inputs) -> outputs")
  _check_alpha(alpha)
  return Attached(predict, alpha)


class Attached:
  """What `attach` returns: the function predict(adapters, inputs, constants) -> outputs."""

  def __init__(self, predict: Predict, alpha: float | None):
    self.predict, self.alpha = predict, alpha

  def __call__(
    self, adapters: Adapters, inputs: PyTree, constants: PyTree, *, rows: Any = None
  ) -> PyTree:
    """Return the outputs. `rows` is (tables, t) if the adapters are rows t of tables [T, ...]."""
    params, adapters = _whole(adapters, constants)
    leaves = [leaf for _, leaf in trees.named_leaves(params)]
    kernels = trees.updates("constants", params, adapters, self.alpha, rows)
    for path, leaf in trees.named_leaves(params):
      if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
        raise TypeError(
          f"constants/{path} is no array; got {type(leaf).__name__}. Take it out of the constants, "
          "for equinox by eqx.partition(model, eqx.is_inexact_array)."
        )
    closed, shape = jax.make_jaxpr(self.predict, return_shape=True)(params, inputs)
    for place, kernel in kernels.items():
      leaves[place] = kernel
    used: set[str] = set()
    outputs = rewrite.run(closed.jaxpr, closed.consts, [*leaves, *jax.tree.leaves(inputs)], used)
    for kernel in kernels.values():
      if kernel.name not in used:
        raise ValueError(
          f"predict uses the adapted kernel {kernel.name!r} in no product, so its adapters change "
          "nothing. Leave it out of the rules."
        )
    for kernel in outputs:
      if isinstance(kernel, low_rank.LowRank):
        raise ValueError(
          f"predict returns the adapted kernel {kernel.name!r}; return products only."
        )
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)


def merge(params: PyTree, adapters: Adapters, alpha: float | None = None) -> PyTree:
  """Return the parameters of one task's whole network, W + (alpha / r) A B.

  Args:
    params: the base network's parameters, or `Base(params, A)` if adapters hold B only.
    adapters: the adapters of one task.
    alpha: as for `attach`.

  Returns:
    Parameters with the structure, shapes and dtypes of the base network's parameters.

  Raises:
    ValueError: adapters do not fit the parameters.

  >>> import jax.numpy as jnp
  >>> adapters = {"kernel": {"A": jnp.ones([2, 1]), "B": jnp.array([[1.0, 2.0]])}}
  >>> merge({"kernel": jnp.eye(2)}, adapters, alpha=2.0)["kernel"].tolist()
  [[3.0, 4.0], [2.0, 5.0]]
  """
  _check_alpha(alpha)
  params, adapters = _whole(adapters, params)
  leaves = [leaf for _, leaf in trees.named_leaves(params)]
  for place, kernel in trees.updates("params", params, adapters, alpha).items():
    merged = kernel.value + low_rank.product_of_factors(kernel)
    leaves[place] = merged.astype(kernel.value.dtype)
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _whole(adapters: Adapters, constants: PyTree) -> tuple[PyTree, Adapters]:
  """Return the network's parameters, and the adapters with A and B and with stacked layers."""
  if isinstance(constants, Base):
    constants, adapters = constants.params, join(adapters, constants.A)
  trees.kernels(adapters, wanted=("A", "B"))
  return constants, stack_layers(adapters)


def _check_alpha(alpha: Any) -> None:
  """Raise TypeError unless alpha is a number, which may be traced, or None."""
  if alpha is not None:
    validate.array("alpha", alpha, "a number or None")
    if isinstance(alpha, bool) or jnp.ndim(alpha) != 0:
      raise TypeError(f"alpha must be a number or None; got {shown(alpha)}.")


__all__ = (
  "Adapters",
  "Base",
  "attach",
  "hold_A",
  "init",
  "join",
  "labels",
  "merge",
  "split_layers",
  "stack_layers",
)
