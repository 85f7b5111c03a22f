"""A kernel W + (alpha / r) A B that is never formed: operations act on its factors.

Every axis of a kernel is of one kind. A string with one letter an axis describes the kernel:

    i  an axis of the input side: it belongs to A
    o  an axis of the output side: it belongs to B
    l  an axis of layers, as `jax.lax.scan` over layers stacks them: both A and B have it

A dense kernel [in, out] is "io", a convolution's kernel [kh, kw, in, out] is "iiio".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_RANK = -1  # the subscript of the rank in an einsum; the kernel's axes are 0, 1, ...
_FREE = 100  # and above: subscripts of the other operand's own axes


class NotFollowed(Exception):
  """A use of a kernel that has no low-rank form; the message says what the use is."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("value", "a", "b"),
  meta_fields=("axes", "name"),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """The kernel value + sum_r a b. Each of its axes is an axis of a, of b, or ("l") of both.

  Attributes:
    value: the base kernel W, with one axis for each letter of `axes`.
    a: the axes "l" and "i" of W in their order, then the rank r.
    b: the axes "l" and "o" of W in their order, then the rank r; it contains the factor alpha / r.
    axes: the kind of every axis of W.
    name: the path of the kernel, for error messages.
  """

  value: Any
  a: Any
  b: Any
  axes: str
  name: str

  @property
  def of_a(self) -> list[int]:
    """The axes of W that `a` has, in the order of `a`."""
    return [n for n, kind in enumerate(self.axes) if kind in "li"]

  @property
  def of_b(self) -> list[int]:
    """The axes of W that `b` has, in the order of `b`."""
    return [n for n, kind in enumerate(self.axes) if kind in "lo"]

  def map(self, f: Callable[[Any, list[int]], Any], value: Any, axes: str | None = None) -> Any:
    """A kernel with f(factor, the axes of W that the factor has) for each of the two factors."""
    a, b = f(self.a, self.of_a), f(self.b, self.of_b)
    return LowRank(value, a, b, self.axes if axes is None else axes, self.name)


def axes_of(a: Sequence[int], b: Sequence[int], layers: int) -> str:
  """Return the kinds of a kernel's axes, such as "io", from the shapes of A and B.

  A kernel "i...o..." has A [i..., r] and B [r, o...]. A kernel "o...i...", as in equinox and
  PyTorch, has A [r, i...] and B [o..., r]. Layers lead both. If the shapes fit both readings, the
  one with the smaller rank is taken, because a rank never exceeds the sizes of the two sides.

  Args:
    a, b: the shapes of A and B.
    layers: the number of leading axes of layers.

  Raises:
    ValueError: the shapes fit neither reading.
  """
  lead, inner_a, inner_b = tuple(a[:layers]), tuple(a[layers:]), tuple(b[layers:])
  readings = []
  if lead == tuple(b[:layers]) and inner_a and inner_b:
    i, o = "i" * (len(inner_a) - 1), "o" * (len(inner_b) - 1)
    if inner_a[-1] == inner_b[0]:
      readings.append((inner_b[0], "l" * layers + i + o))
    if inner_a[0] == inner_b[-1]:
      readings.append((inner_a[0], "l" * layers + o + i))
  if not readings:
    raise ValueError(
      f"A has shape {tuple(a)} and B has shape {tuple(b)}: they share no rank. Expected A [in, r] "
      "and B [r, out], or A [r, in] and B [out, r] for kernels [out, in], behind equal axes of "
      "layers; for the adapters of T tasks use jax.vmap."
    )
  return min(readings, key=lambda reading: reading[0])[1]


def with_rank_last(a: Any, b: Any, axes: str) -> tuple[Any, Any]:
  """A and B as `LowRank` wants them, with the rank as their last axis."""
  layers = axes.count("l")
  if axes.rfind("i") < axes.rfind("o"):  # in before out: A [i..., r], B [r, o...]
    return a, jnp.moveaxis(b, layers, -1)
  return jnp.moveaxis(a, layers, -1), b


def product_of_factors(kernel: LowRank) -> jax.Array:
  """sum_r a b, with the shape of the kernel: the update that `merge` adds to W."""
  rank = len(kernel.axes)
  return jnp.einsum(
    kernel.a, [*kernel.of_a, rank], kernel.b, [*kernel.of_b, rank], list(range(rank))
  )


# How a kernel moves: each rule is (kernel, the equation's parameters, its other operands).


def cast(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """convert_element_type: W and both factors take the new dtype."""
  dtype = params["new_dtype"]
  if not jnp.issubdtype(dtype, jnp.floating):
    raise NotFollowed(f"a cast to {dtype}")
  return kernel.map(lambda x, _: x.astype(dtype), kernel.value.astype(dtype))


def transpose(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """transpose: each factor permutes the axes that it has."""
  permutation = params["permutation"]

  def permute(x: Any, has: list[int]) -> Any:
    return x.transpose([*(has.index(p) for p in permutation if p in has), len(has)])

  axes = "".join(kernel.axes[p] for p in permutation)
  return kernel.map(permute, kernel.value.transpose(permutation), axes)


def cut(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """slice: each factor is cut along the axes that it has."""
  shape = kernel.value.shape
  strides = params["strides"] or (1,) * len(shape)
  index = [
    slice(*bounds)
    for bounds in zip(params["start_indices"], params["limit_indices"], strides, strict=True)
  ]
  return kernel.map(lambda x, has: x[tuple(index[n] for n in has)], kernel.value[tuple(index)])


def dynamic_cut(kernel: LowRank, params: dict[str, Any], *starts: Any) -> LowRank:
  """dynamic_slice: as `cut`, from positions known at run time, such as the number of a layer."""
  sizes = params["slice_sizes"]

  def one(x: Any, has: list[int]) -> Any:
    rank = x.shape[len(has) :]
    first = [*(starts[n] for n in has), *(jnp.zeros_like(starts[0]) for _ in rank)]
    return jax.lax.dynamic_slice(x, first, [*(sizes[n] for n in has), *rank])

  return kernel.map(one, one(kernel.value, list(range(len(sizes)))))


def reverse(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """rev: each factor is reversed along the axes that it has."""
  turn = lambda x, has: jax.lax.rev(x, [has.index(d) for d in params["dimensions"] if d in has])
  return kernel.map(turn, jax.lax.rev(kernel.value, params["dimensions"]))


def divide(kernel: LowRank, params: dict[str, Any]) -> list[LowRank]:
  """split: the pieces of `jnp.split`, each a kernel."""
  axis, start, pieces = params["axis"], 0, []
  for size in params["sizes"]:
    low, high = [0] * len(kernel.axes), list(kernel.value.shape)
    low[axis], high[axis] = start, start + size
    pieces.append(cut(kernel, dict(start_indices=low, limit_indices=high, strides=None)))
    start += size
  return pieces


def reshape(kernel: LowRank, shape: Sequence[int]) -> LowRank:
  """reshape, squeeze, expand_dims: axes of one kind may merge and split, sides may not mix."""
  old = [(n, size) for n, size in enumerate(kernel.value.shape) if size != 1]
  axes, position = "", 0
  pending, kind = 1, ""  # what the open group still has to give, and its kind
  for size in shape:
    if size == 1:
      axes += "i"  # an axis of size 1 may go to either side
      continue
    if pending == 1:
      kind = ""
    while pending % size:  # take in old axes until the group holds `size`
      n, more = old[position]
      if kind not in ("", kernel.axes[n]):
        raise NotFollowed(f"a reshape {kernel.value.shape} -> {tuple(shape)} across its two sides")
      pending, kind, position = pending * more, kernel.axes[n], position + 1
    pending //= size
    axes += kind
  side = lambda x, kinds: x.reshape(
    [*(s for s, c in zip(shape, axes, strict=True) if c in kinds), x.shape[-1]]
  )
  a, b = side(kernel.a, "li"), side(kernel.b, "lo")
  return LowRank(kernel.value.reshape(shape), a, b, axes, kernel.name)


def add_axes(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """broadcast_in_dim, as far as it only adds axes of size 1."""
  shape, places = params["shape"], params["broadcast_dimensions"]
  if math.prod(shape) != kernel.value.size or list(places) != sorted(places):
    raise NotFollowed(f"a broadcast {kernel.value.shape} -> {tuple(shape)}")
  return reshape(kernel, shape)


# How a kernel multiplies.


def matrix_product(x: Any, kernel: LowRank, params: dict[str, Any], kernel_first: bool) -> Any:
  """The part (x a) b of dot_general(x, W + a b), or of dot_general(W + a b, x).

  Args:
    params: those of the equation dot_general.
    kernel_first: the kernel is the first operand.
  """
  contract, batch = params["dimension_numbers"]
  if kernel_first:
    contract, batch = contract[::-1], batch[::-1]
  of_x = [_FREE + n for n in range(x.ndim)]
  for n, k in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True):
    of_x[n] = k
  own_x = [n for n in of_x if n >= _FREE]
  own_kernel = [n for n in range(len(kernel.axes)) if n not in (*contract[1], *batch[1])]
  own = [*own_kernel, *own_x] if kernel_first else [*own_x, *own_kernel]
  out = [*batch[1], *own]
  names = {n: i for i, n in enumerate(sorted({*of_x, *range(len(kernel.axes)), _RANK}))}

  factors = [(kernel.a, [*kernel.of_a, _RANK]), (kernel.b, [*kernel.of_b, _RANK])]
  if any(kernel.axes[n] == "o" for n in contract[1]) and not any(
    kernel.axes[n] == "i" for n in contract[1]
  ):
    factors.reverse()  # x meets the side that it contracts first, so that only r numbers are left
  (first, has_first), (second, has_second) = factors
  kept = {*out, *has_second}
  inner = [n for n in dict.fromkeys([*of_x, *has_first]) if n in kept]

  def times(u: Any, of_u: list[int], v: Any, of_v: list[int], of_out: list[int]) -> Any:
    label = lambda ns: [names[n] for n in ns]
    return jnp.einsum(
      u,
      label(of_u),
      v,
      label(of_v),
      label(of_out),
      precision=params["precision"],
      preferred_element_type=_accumulator(params, u, v),
    )

  return times(times(x, of_x, first, has_first, inner), inner, second, has_second, out)


def _accumulator(params: dict[str, Any], *operands: Any) -> Any:
  """The dtype in which a product sums: the equation's, or the operands' if that is wider."""
  dtype = params["preferred_element_type"]
  return None if dtype is None else jnp.promote_types(dtype, jnp.result_type(*operands))


def convolution(x: Any, kernel: LowRank, params: dict[str, Any]) -> Any:
  """The part (x * a) b of a convolution of x with W + a b.

  The window and one of the two channel axes belong to a; b mixes the r channels point by point.
  """
  spec = params["dimension_numbers"]
  out_axis, in_axis = spec.rhs_spec[:2]
  kinds = lambda axis: {kind for n, kind in enumerate(kernel.axes) if n != axis}
  groups, plain = params["feature_group_count"], params["batch_group_count"] == 1
  if plain and kernel.axes[out_axis] == "o" and kinds(out_axis) == {"i"}:
    a = jnp.moveaxis(kernel.a, -1, out_axis)
    a = jnp.concatenate([a] * groups, out_axis)  # every group of outputs sees its own inputs
    y = jnp.moveaxis(_convolve(x, a, params), spec.out_spec[1], -1)
    y = y.reshape(*y.shape[:-1], groups, -1)
    b = kernel.b.reshape(groups, -1, kernel.b.shape[-1])
    y = jnp.einsum("...gr,gor->...go", y, b, precision=params["precision"])
    return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, spec.out_spec[1])
  if plain and groups == 1 and kernel.axes[in_axis] == "o" and kinds(in_axis) == {"i"}:
    channel = spec.lhs_spec[1]
    x = jnp.moveaxis(x, channel, -1)
    x = jnp.einsum("...o,or->...r", x, kernel.b, precision=params["precision"])
    return _convolve(jnp.moveaxis(x, -1, channel), jnp.moveaxis(kernel.a, -1, in_axis), params)
  raise NotFollowed(
    f'a convolution of kind {spec}, in {groups} groups, whose kernel has the axes "{kernel.axes}"'
  )


def _convolve(x: Any, kernel: Any, params: dict[str, Any]) -> Any:
  dtype = jnp.result_type(x, kernel)
  params = {**params, "preferred_element_type": _accumulator(params, x, kernel)}
  names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
  more = ("feature_group_count", "batch_group_count", "precision", "preferred_element_type")
  keywords = {name: params[name] for name in (*names, *more)}
  return jax.lax.conv_general_dilated(x.astype(dtype), kernel.astype(dtype), **keywords)
