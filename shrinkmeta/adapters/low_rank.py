"""Kernels W + (alpha / r) A B that are stored as W, A and B; the sum is never formed.

A string describes the axes of a kernel W, with one letter for each axis:

    i  an axis of the input side; A has this axis and B does not
    o  an axis of the output side; B has this axis and A does not
    l  an axis of layers, which `jax.lax.scan` over layers needs; A and B both have this axis

A dense kernel [in, out] is "io". A convolution's kernel [height, width, in, out] is "iiio".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Labels = tuple[int, ...]  # the names of a factor's axes; the axes of the kernel are 0, 1, ...
RANK = -1  # the label of the rank axis of both factors
_FREE = 100  # the first label for axes of the other operand that are not contracted or batched


class NotFollowed(Exception):
  """The error for a use of a kernel that has no low-rank form; the message names the use."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("value", "a", "b", "rows"),
  meta_fields=("of_a", "of_b", "name"),
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """The sum of `value` and sum_r a[..., r, ...] b[..., r, ...], stored as these three arrays.

  Each axis of the kernel is an axis of `a` (kind "i"), of `b` (kind "o") or of both (kind "l").
  Labels name the axes of a factor, as in an einsum. So a factor keeps its layout while the axes of
  the kernel change places: a scan over layers reads A [l, i, r] and B [l, r, o] as they are stored.

  Attributes:
    value: the base kernel W.
    a: the factor A.
    b: the factor (alpha / r) B.
    of_a, of_b: for each axis of the factor, the axis of W that it is, or RANK.
    name: the path of the kernel, for error messages.
    rows: for each factor, the `rewrite.Row` from which it was gathered, or None.
  """

  value: Any
  a: Any
  b: Any
  of_a: Labels
  of_b: Labels
  name: str
  rows: tuple[Any, ...] = (None, None)

  @property
  def axes(self) -> str:
    """The kinds of the axes of W, one letter for each axis."""
    kind = lambda n: "l" if n in self.of_a and n in self.of_b else "i" if n in self.of_a else "o"
    return "".join(map(kind, range(len({*self.of_a, *self.of_b}) - 1)))

  @property
  def factors(self) -> tuple[tuple[Any, Labels], tuple[Any, Labels]]:
    """Both factors with their labels."""
    return (self.a, self.of_a), (self.b, self.of_b)

  def map(self, f: Callable[[Any, Labels], Any], value: Any) -> "LowRank":
    """Return a kernel with the base `value` and the factors f(factor, its labels)."""
    a, b = (f(factor, of) for factor, of in self.factors)
    return dataclasses.replace(self, value=value, a=a, b=b, rows=(None, None))

  def renamed(self, names: Callable[[int], int]) -> "LowRank":
    """Return the kernel with the labels names(n) in place of n; RANK stays."""
    new = lambda of: tuple(n if n == RANK else names(n) for n in of)
    return dataclasses.replace(self, of_a=new(self.of_a), of_b=new(self.of_b), rows=(None, None))


def axes_of(a: Sequence[int], b: Sequence[int], layers: int) -> str:
  """Return the kinds of a kernel's axes, such as "io", from the shapes of A and B.

  A kernel "i...o..." has A [i..., r] and B [r, o...]. A kernel "o...i...", as in equinox and
  PyTorch, has A [r, i...] and B [o..., r]. The axes of layers come first in both factors. If both
  readings fit, the function takes the one with the smaller rank. In the other reading the rank
  would exceed a side of the kernel, which is impossible: A [5, 2] and B [2, 5] have rank 2, because
  a rank of 5 would exceed the sides of 2.

  Args:
    a, b: the shapes of A and B.
    layers: the number of axes of layers, which come first.

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


def labels_of(axes: str) -> tuple[Labels, Labels]:
  """Return the labels of A and of B, as `axes_of` reads their shapes: "lio" has (0, 1, RANK)."""
  of = lambda kind: tuple(n for n, one in enumerate(axes) if one == kind)
  layers, a, b = of("l"), of("i"), of("o")
  if a < b:  # in before out
    return (*layers, *a, RANK), (*layers, RANK, *b)
  return (*layers, RANK, *a), (*layers, *b, RANK)


def in_order(factor: Any, of: Labels, rank: int) -> Any:
  """Put the axes of a factor in the order of the kernel's, with the rank as the axis `rank`."""
  return factor.transpose(sorted(range(len(of)), key=lambda k: rank if of[k] == RANK else of[k]))


def product_of_factors(kernel: LowRank) -> jax.Array:
  """Return sum_r a b with the shape of W: the update that `merge` adds to W."""
  label = lambda of: [n + 1 for n in of]  # an einsum has none below 0
  (a, of_a), (b, of_b) = kernel.factors
  return jnp.einsum(a, label(of_a), b, label(of_b), label(range(len(kernel.axes))))


# Rules for operations that rearrange or cast a kernel. The arguments of a rule are the kernel, the
# parameters of the traced equation, and the other operands of the equation.


def cast(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """Apply `convert_element_type`: cast W and both factors to the new dtype."""
  dtype = params["new_dtype"]
  if not jnp.issubdtype(dtype, jnp.floating):
    raise NotFollowed(f"a cast to {dtype}")
  return kernel.map(lambda x, _: x.astype(dtype), kernel.value.astype(dtype))


def transpose(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """Apply `transpose`: permute the axes of W; those of the factors get new labels."""
  turned = kernel.renamed(list(params["permutation"]).index)
  return dataclasses.replace(turned, value=kernel.value.transpose(params["permutation"]))


def cut(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """Apply `slice`: cut W, and cut each factor along the axes that it has."""
  shape = kernel.value.shape
  strides = params["strides"] or (1,) * len(shape)
  bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
  index = [slice(*one) for one in bounds]
  part = lambda of: tuple(slice(None) if n == RANK else index[n] for n in of)
  return kernel.map(lambda x, of: x[part(of)], kernel.value[tuple(index)])


def dynamic_cut(kernel: LowRank, params: dict[str, Any], *starts: Any) -> LowRank:
  """Apply `dynamic_slice`: cut at positions known at run time, such as the number of a layer."""
  sizes = params["slice_sizes"]

  def one(x: Any, of: Labels) -> Any:
    first = [jnp.zeros_like(starts[0]) if n == RANK else starts[n] for n in of]
    wanted = [size if n == RANK else sizes[n] for n, size in zip(of, x.shape, strict=True)]
    return jax.lax.dynamic_slice(x, first, wanted)

  return kernel.map(one, one(kernel.value, tuple(range(len(sizes)))))


def reverse(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """Apply `rev`: reverse W, and reverse each factor along the axes that it has."""
  turn = lambda x, of: jax.lax.rev(x, [of.index(d) for d in params["dimensions"] if d in of])
  return kernel.map(turn, jax.lax.rev(kernel.value, params["dimensions"]))


def divide(kernel: LowRank, params: dict[str, Any]) -> list[LowRank]:
  """Apply `split`: return the pieces of the kernel, each of them a kernel."""
  axis, start, pieces = params["axis"], 0, []
  for size in params["sizes"]:
    low, high = [0] * len(kernel.axes), list(kernel.value.shape)
    low[axis], high[axis] = start, start + size
    pieces.append(cut(kernel, dict(start_indices=low, limit_indices=high, strides=None)))
    start += size
  return pieces


def reshape(kernel: LowRank, shape: Sequence[int]) -> LowRank:
  """Apply `reshape`, `squeeze` or `expand_dims`.

  Axes of the same kind may merge and split. Axes of different kinds may not merge, because the
  factors could not represent the merged axis.

  Raises:
    NotFollowed: the new shape merges axes of different kinds.
  """
  old = [(n, size) for n, size in enumerate(kernel.value.shape) if size != 1]
  axes, position = "", 0
  # Old axes are read in order and form a group. `pending` is the size that the group has not yet
  # given to new axes, and `kind` is the kind of its axes.
  pending, kind = 1, ""
  for size in shape:
    if size == 1:
      axes += "i"  # an axis of size 1 may belong to either side
      continue
    if pending == 1:
      kind = ""
    while pending % size:  # add old axes to the group until `size` divides its size
      n, more = old[position]
      if kind not in ("", kernel.axes[n]):
        raise NotFollowed(f"a reshape {kernel.value.shape} -> {tuple(shape)} across its two sides")
      pending, kind, position = pending * more, kernel.axes[n], position + 1
    pending //= size
    axes += kind
  of_a, of_b = ([n for n, kind in enumerate(axes) if kind != other] for other in "oi")
  a = in_order(kernel.a, kernel.of_a, len(kernel.axes)).reshape([*(shape[n] for n in of_a), -1])
  b = in_order(kernel.b, kernel.of_b, len(kernel.axes)).reshape([*(shape[n] for n in of_b), -1])
  return LowRank(kernel.value.reshape(shape), a, b, (*of_a, RANK), (*of_b, RANK), kernel.name)


def add_axes(kernel: LowRank, params: dict[str, Any]) -> LowRank:
  """Apply `broadcast_in_dim` if it only adds axes of size 1; otherwise raise NotFollowed."""
  shape, places = params["shape"], params["broadcast_dimensions"]
  if math.prod(shape) != kernel.value.size or list(places) != sorted(places):
    raise NotFollowed(f"a broadcast {kernel.value.shape} -> {tuple(shape)}")
  return reshape(kernel, shape)


# Products with a kernel.


def matrix_product(x: Any, kernel: LowRank, params: dict[str, Any], kernel_first: bool) -> Any:
  """Return the low-rank part (x a) b of the product `dot_general` of x and a kernel W + a b.

  Args:
    x: the other operand.
    kernel: the kernel.
    params: the parameters of the equation `dot_general`.
    kernel_first: whether the kernel is the first operand. This sets the order of the output's axes.
  """
  contract, batch = params["dimension_numbers"]
  if kernel_first:
    contract, batch = contract[::-1], batch[::-1]
  # An axis of x that is contracted or batched has the label of its partner among the kernel's axes.
  of_x = [_FREE + n for n in range(x.ndim)]
  for n, k in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True):
    of_x[n] = k
  own_x = [n for n in of_x if n >= _FREE]
  own_kernel = [n for n in range(len(kernel.axes)) if n not in (*contract[1], *batch[1])]
  own = [*own_kernel, *own_x] if kernel_first else [*own_x, *own_kernel]
  out = [*batch[1], *own]
  names = {n: i for i, n in enumerate(sorted({*of_x, *range(len(kernel.axes)), RANK}))}

  kinds = {kernel.axes[n] for n in contract[1]}
  # x is multiplied first by the factor whose axes it contracts: r numbers are left.
  b_first = "o" in kinds and "i" not in kinds
  (first, has_first), (second, has_second) = kernel.factors[:: -1 if b_first else 1]
  kept = {*out, *has_second}
  inner = [n for n in dict.fromkeys([*of_x, *has_first]) if n in kept]

  def times(u: Any, of_u: Sequence[int], v: Any, of_v: Labels, of_out: list[int]) -> Any:
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
  """Return the dtype of a product's sums: the equation's, or the operands' if that is wider."""
  dtype = params["preferred_element_type"]
  return None if dtype is None else jnp.promote_types(dtype, jnp.result_type(*operands))


def convolution(x: Any, kernel: LowRank, params: dict[str, Any]) -> Any:
  """Return the low-rank part of the convolution of a signal x with a kernel W + a b.

  Factor `a` has the axes of the window and one of the two channel axes. Factor `b` has the other
  channel axis. So one part is a convolution with `a`, and the other is a matrix product with `b`
  over channels, at each position of the signal. There are two cases:

  - `b` has the output channels. The convolution of x with `a` gives r channels in each group. Then
    `b` turns these r channels into the output channels of the group.
  - `b` has the input channels, as in a transposed convolution. First `b` turns the input channels
    of x into r channels. Then these are convolved with `a`. There may be one group only.

  Args:
    x: the signal, with the axes in the order of params["dimension_numbers"].lhs_spec.
    kernel: the kernel.
    params: the parameters of the equation `conv_general_dilated`.

  Raises:
    NotFollowed: the kernel or the groups fit neither case.
  """
  spec = params["dimension_numbers"]
  out_axis, in_axis = spec.rhs_spec[:2]
  if "o" not in kernel.axes:  # `reshape` calls every axis of size 1 an input
    for axis in (out_axis, in_axis):
      if kernel.value.shape[axis] == 1 and "o" not in kernel.axes:
        kernel = _with_output(kernel, axis)
  b = in_order(kernel.b, kernel.of_b, len(kernel.axes))
  kinds = lambda axis: {kind for n, kind in enumerate(kernel.axes) if n != axis}
  groups, plain = params["feature_group_count"], params["batch_group_count"] == 1
  if plain and kernel.axes[out_axis] == "o" and kinds(out_axis) == {"i"}:
    a = in_order(kernel.a, kernel.of_a, out_axis)
    a = jnp.concatenate([a] * groups, out_axis)  # each group applies the same `a` to its own inputs
    y = jnp.moveaxis(_convolve(x, a, params), spec.out_spec[1], -1)
    y = y.reshape(*y.shape[:-1], groups, -1)
    b = b.reshape(groups, -1, b.shape[-1])
    y = jnp.einsum("...gr,gor->...go", y, b, precision=params["precision"])
    return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, spec.out_spec[1])
  if plain and groups == 1 and kernel.axes[in_axis] == "o" and kinds(in_axis) == {"i"}:
    channel = spec.lhs_spec[1]
    x = jnp.moveaxis(x, channel, -1)
    x = jnp.einsum("...o,or->...r", x, b, precision=params["precision"])
    a = in_order(kernel.a, kernel.of_a, in_axis)
    return _convolve(jnp.moveaxis(x, -1, channel), a, params)
  hint = ', "l" of layers; a kernel [width, in, out] needs the rule (rank, "iio")'
  raise NotFollowed(
    f"a convolution of kind {spec}, in {groups} groups, whose kernel has the axes "
    f'"{kernel.axes}"{hint if "l" in kernel.axes else ""}'
  )


def _with_output(kernel: LowRank, axis: int) -> LowRank:
  """Give an axis of size 1 of the kernel to `b` instead of `a`."""
  a = jnp.squeeze(kernel.a, kernel.of_a.index(axis))
  of_a = tuple(n for n in kernel.of_a if n != axis)
  return LowRank(kernel.value, a, kernel.b[None], of_a, (axis, *kernel.of_b), kernel.name)


def _convolve(x: Any, kernel: Any, params: dict[str, Any]) -> Any:
  dtype = jnp.result_type(x, kernel)
  params = {**params, "preferred_element_type": _accumulator(params, x, kernel)}
  names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
  more = ("feature_group_count", "batch_group_count", "precision", "preferred_element_type")
  keywords = {name: params[name] for name in (*names, *more)}
  return jax.lax.conv_general_dilated(x.astype(dtype), kernel.astype(dtype), **keywords)
