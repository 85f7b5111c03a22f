"""A 3 x 3 convolution that is fast on a CPU, and so are all its derivatives.

With shifts a, b in {-1, 0, 1} and zeros outside the image, the convolution and its kernel gradient

    f(x, k)[n, i, j, :] = sum_ab   x[n, i + a, j + b, :] k[a, b, :, :]
    g(x, y)[a, b, :, :] = sum_nij  x[n, i + a, j + b, :]^T y[n, i, j, :]

are a closed pair of bilinear maps. With rot(k)[a, b] = k[-a, -b]^T their transposes are

    f in x: y -> f(y, rot(k))        f in k: y -> g(x, y)
    g in x: k -> f(y, rot(k))        g in y: k -> f(x, k)

so derivatives of any order, forward or reverse, consist of f and g. These are two primitives of
JAX. Their operands have a leading axis T of tasks. If both operands are mapped, vmap adds its axis
to T, so the result is again f or g. Differentiating XLA's convolution instead gives transposes in
slow layouts, and grouped convolutions under vmap. Both are several times slower on a CPU
(docs/hazards.md#grouped-convolutions).

Axes: T tasks, N images, H and W their sides, C and F channels, P tiles. Shapes of one task's arrays
have no T. The abstract values name no mesh axes, so `shard_map` needs `check_vma=False`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_LAYOUT = ("NHWC", "HWIO", "NHWC")  # the one in which XLA's convolution is fast on a CPU


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """3 x 3 convolution, stride 1, zero padding: x [N, H, W, C], kernel [3, 3, C, F] -> [N, H, W, F].

  Both operands may be differentiated, to any order and in any mode, and may be vmapped.
  """
  if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[:3] != (3, 3, x.shape[3]):
    raise ValueError(
      "conv3x3 wants images [N, H, W, C] and a kernel [3, 3, C, F]; "
      f"got images {x.shape} and a kernel {kernel.shape}. For an axis of tasks use jax.vmap."
    )
  dtype = jnp.result_type(x, kernel)
  return _conv.bind(x.astype(dtype)[None], kernel.astype(dtype)[None])[0]


# --- the ordinary convolution, of one task -------------------------------------------------------


def _lax_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def _lax_kernel_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
  kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], y.shape[-1]), x.dtype)
  return jax.linear_transpose(lambda kernel: _lax_conv(x, kernel), kernel)(y)[0]


def _lax_kernel_gradient_in_layout(x: jax.Array, y: jax.Array) -> jax.Array:
  """Compute the same, with C as images, N as channels and y as a kernel, to get `_LAYOUT`."""
  x, y = x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3)
  pad = ((1, 1), (1, 1))
  out = jax.lax.conv_general_dilated(x, y, (1, 1), pad, dimension_numbers=_LAYOUT)
  return out.transpose(1, 2, 0, 3)


# --- one matrix product over the nine shifted images, of one task --------------------------------


def _patches(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> [N H W, 9 C]."""
  h, w = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifted, -1).reshape(-1, 9 * x.shape[-1])


def _patches_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return (_patches(x) @ kernel.reshape(-1, kernel.shape[-1])).reshape(*x.shape[:3], -1)


def _patches_kernel_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
  n, h, w, c = x.shape
  x = jnp.pad(jnp.moveaxis(x, 3, 0), ((0, 0), (0, 0), (1, 1), (1, 1)))
  shifted = jnp.stack([x[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)])
  rows = shifted.reshape(9 * c, n * h * w)  # a transpose of `_patches` would be slow to write
  return (rows @ y.reshape(n * h * w, -1)).reshape(3, 3, c, -1)


# --- the ordinary convolution, with zeros for more channels and features --------------------------


def _padded_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolve with zeros up to 2^i channels and 32 features, and drop the additional features.

  XLA's fast convolution is not used for 16 features, and is not fast for 3 channels. With the zeros
  it has more to compute, and takes a quarter of the time (docs/hazards.md#few-features).
  """
  c, f = kernel.shape[2:]
  more = (1 << (c - 1).bit_length()) - c
  x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
  return _lax_conv(x, jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 32 - f))))[..., :f]


# --- Winograd's F(2 x 2, 3 x 3), of one task -----------------------------------------------------
#
# Two outputs of a filter with three taps cost four products in place of six,
#
#     A^T [(G k) * (B^T d)],   d four inputs, k three taps, * by element,
#
#           [1  0 -1  0]        [ 1    0    0 ]
#     B^T = [0  1  1  0]    G = [1/2  1/2  1/2]    A^T = [1  1  1  0]
#           [0 -1  1  0]        [1/2 -1/2  1/2]          [0  1 -1 -1]
#           [0  1  0 -1]        [ 0    0    1 ]
#
# and in both directions of the image 16 in place of 36, for each 2 x 2 tile of the output:
#
#     f(x, k) = A^T [U * V] A,   V = B^T d B,   U = G k G^T,
#     g(x, y) = G^T [V * (A y A^T)] G, summed over the tiles;
#
# with channels each of the 16 products is a matrix product over all the tiles.
#
# References: Winograd, Arithmetic Complexity of Computations, 1980. Lavin and Gray, Fast Algorithms
# for Convolutional Neural Networks, 2015.

# B^T and A act on images, and are written as sums. A product with such a small matrix would cost
# more there. For kernels and for the 16 products it costs the same, and compiles faster.
_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
_AT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

# Each map acts along one axis, which it gets and returns as a sequence of arrays.
_bt = lambda d: (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])
_a = lambda y: (y[0], y[0] + y[1], y[0] - y[1], -y[1])
_Map = Callable[[Sequence[jax.Array]], tuple[jax.Array, ...]]


def _both_ways(m: np.ndarray, z: jax.Array) -> jax.Array:
  """Return M z M^T for the two leading axes of z, by one product with the Kronecker square of M."""
  y = jnp.asarray(np.kron(m, m), z.dtype) @ z.reshape(m.shape[1] ** 2, -1)
  return y.reshape(len(m), len(m), *z.shape[2:])


def _of_tiles(m: _Map, x: jax.Array, size: int, margin: int) -> jax.Array:
  """Return M d M^T of every size x size tile d of the images, two pixels apart: [16, P, C].

  The first tile begins `margin` pixels outside the image. M is applied to whole rows of tiles, then
  to columns. This takes 4 + 4 sums of large arrays, instead of 32 sums of small ones, and XLA
  compiles it in half the time.
  """
  n, h, w, c = x.shape
  h, w = h + h % 2, w + w % 2
  x = jnp.pad(
    x, ((0, 0), (margin, h - x.shape[1] + margin), (margin, w - x.shape[2] + margin), (0, 0))
  )
  rows = jnp.stack(m([x[:, i : i + h : 2] for i in range(size)]))
  both = jnp.stack(m([rows[:, :, :, j : j + w : 2] for j in range(size)]), 1)
  return both.reshape(16, -1, c)


def _winograd_conv_at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
  n, h, w, _ = x.shape
  v = _of_tiles(_bt, x, 4, 1)
  u = _both_ways(_G, kernel).reshape(16, *kernel.shape[2:])
  m = jnp.einsum("spc,scf->spf", v, u).reshape(4, 4, n, (h + 1) // 2, (w + 1) // 2, -1)
  y = _both_ways(_AT, m).transpose(2, 3, 0, 4, 1, 5)  # [n, h / 2, 2, w / 2, 2, F]
  return y.reshape(n, h + h % 2, w + w % 2, -1)[:, :h, :w]


def _winograd_kernel_gradient_at_once(x: jax.Array, y: jax.Array) -> jax.Array:
  v = _of_tiles(_bt, x, 4, 1)
  m = _of_tiles(_a, y, 2, 0)
  u = jnp.einsum("spc,spf->scf", v, m)
  return _both_ways(_G.T, u.reshape(4, 4, *u.shape[1:]))


# V is four times as large as x: the images go through in blocks whose V, 1 MB in float32, a core's
# own cache holds. The kernel gradient of 75 images of 14 x 14 x 64 takes 7.6 ms so and 9.7 at once,
# of 300 images 31 and 55. And memory holds one block's V and products in place of all.
_BLOCK = 2**18  # numbers in V


def image_blocks(x: jax.Array, images: int) -> jax.Array:
  """Cut [N, ...] into equal blocks [blocks, at most `images`, ...], padded with zeros."""
  n = x.shape[0]
  count = -(-n // max(1, images))
  size = -(-n // count)
  x = jnp.pad(x, ((0, count * size - n), *[(0, 0)] * (x.ndim - 1)))
  return x.reshape(count, size, *x.shape[1:])


def in_blocks(f: Callable[[jax.Array], jax.Array], x: jax.Array, images: int) -> jax.Array:
  """Return f(x) [N, ...], block by block; f must treat each image of x [N, ...] by itself."""
  if len(x) <= images:
    return f(x)
  blocks = image_blocks(x, images)
  out = jax.eval_shape(f, blocks[0])
  if (out.shape, out.dtype) == (blocks.shape[1:], blocks.dtype):
    # Each result takes the place of its block, and needs no other where x is needed no more.
    replace = lambda i, y: y.at[i].set(f(y[i]))
    y = jax.lax.fori_loop(0, len(blocks), replace, blocks)
  else:
    y = jax.lax.map(f, blocks)
  return y.reshape(-1, *y.shape[2:])[: len(x)]


def _images_a_block(x: jax.Array, features: int) -> int:
  tiles = (x.shape[1] + 1) // 2 * ((x.shape[2] + 1) // 2)
  return max(1, _BLOCK // (16 * tiles * max(x.shape[3], features)))


def _winograd_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  images = _images_a_block(x, kernel.shape[3])
  return in_blocks(lambda x: _winograd_conv_at_once(x, kernel), x, images)


def _winograd_kernel_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
  images = _images_a_block(x, y.shape[3])
  if len(x) <= images:
    return _winograd_kernel_gradient_at_once(x, y)

  def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + _winograd_kernel_gradient_at_once(*block), None

  zero = jnp.zeros((3, 3, x.shape[3], y.shape[3]), x.dtype)
  return jax.lax.scan(add, zero, (image_blocks(x, images), image_blocks(y, images)))[0]


# --- what runs where -----------------------------------------------------------------------------
#
# Measured in float32 on two cores of a busy machine, one task after another on each of two devices;
# microseconds a task, f then g, minima of seven to nine runs (a rough guide, to about 20 %):
#
#   N, H = W, C, F      XLA's, in layout    patches          Winograd
#   5, 14, 64, 64          1018   1262     1394   1627      685   1048
#   75, 14, 64, 64        15612  35130    36706  45671    11815  27531
#   75, 7, 64, 64          4191   6230     5456   6572     3132   6030
#   75, 4, 64, 64          1708   2033                      888    879
#   75, 3, 64, 64           827    870      907   1097      796   1118
#   75, 14, 32, 32         4075  10281    11211  13923     3777   7980
#   75, 14, 16, 16         1582   2171     2830   3110     1819   3161
#   20, 28, 3, 64          1581   2120     1693   1757     3116   7597
#   75, 28, 1, 64         12810   8652    14670   5282
#
# On a quiet machine, one core, f with pooling and ReLU, with zeros for more features and channels:
#
#   N, H = W, C, F      XLA's    patches    XLA's, padded
#   60, 14, 1, 16         395        225              131
#   20, 32, 3, 32        1126        673              293


def _winograd_pays(x: jax.Array, features: int) -> bool:
  large = min(x.shape[2:4]) >= 4 and min(x.shape[4], features) >= 32
  return large and x.dtype in (jnp.float32, jnp.float64)


def _zeros_pay(x: jax.Array, features: int) -> bool:
  channels = x.shape[4]
  slow = channels in (3, 5, 7) and x.dtype == jnp.float32  # in float64 they are not slow
  return channels <= 8 and (features <= 16 or (slow and features <= 32))


def _cpu_f(x: jax.Array, kernel: jax.Array) -> jax.Array:
  if _winograd_pays(x, kernel.shape[4]):
    f = _winograd_conv
  elif len(x) == 1 and _zeros_pay(x, kernel.shape[4]):
    f = _padded_conv
  else:  # with a kernel for each task XLA's would be a grouped convolution, slow on a CPU
    f = _lax_conv if len(x) == 1 else _patches_conv
  return jax.vmap(f)(x, kernel)


def _cpu_g(x: jax.Array, y: jax.Array) -> jax.Array:
  if _winograd_pays(x, y.shape[4]):
    g = _winograd_kernel_gradient
  else:
    in_layout = len(x) == 1 and x.shape[4] >= 8
    g = _lax_kernel_gradient_in_layout if in_layout else _patches_kernel_gradient
  return jax.vmap(g)(x, y)


# --- the two primitives --------------------------------------------------------------------------


def _shape_f(x: ShapedArray, kernel: ShapedArray) -> ShapedArray:
  """x [T, N, H, W, C], kernel [T, 3, 3, C, F] -> [T, N, H, W, F]."""
  return ShapedArray((*x.shape[:4], kernel.shape[4]), x.dtype)


def _shape_g(x: ShapedArray, y: ShapedArray) -> ShapedArray:
  """x [T, N, H, W, C], y [T, N, H, W, F] -> [T, 3, 3, C, F]."""
  return ShapedArray((x.shape[0], 3, 3, x.shape[4], y.shape[4]), x.dtype)


def _batching_rule(primitive: Primitive, alone: Sequence[tuple[int, int]]) -> Callable:
  """Return a rule that merges the axis of a vmap into an axis of the operands, as its major part.

  Args:
    primitive: f or g.
    alone: one pair of axes for each operand. If only this operand is mapped, the new axis is merged
      into the first axis of the pair, in the operand, and split off the second, in the result. If
      both are mapped, it is merged into T.
  """

  def rule(operands, dims):
    both = None not in dims
    which = 0 if dims[0] is not None else 1
    size = operands[which].shape[dims[which]]
    into, out = (0, 0) if both else alone[which]

    def fold(a, dim):
      if dim is None:
        return a
      a = jnp.moveaxis(a, dim, into)
      return a.reshape(*a.shape[:into], size * a.shape[into + 1], *a.shape[into + 2 :])

    y = primitive.bind(*map(fold, operands, dims))
    return y.reshape(*y.shape[:out], size, y.shape[out] // size, *y.shape[out + 1 :]), out

  return rule


def _primitive(name: str, shape: Callable, cpu: Callable, other: Callable, alone) -> Primitive:
  primitive = Primitive(name)
  primitive.def_impl(jax.jit(primitive.bind))  # outside of jit, too, the platform's lowering
  primitive.def_abstract_eval(shape)
  batching.primitive_batchers[primitive] = _batching_rule(primitive, alone)
  mlir.register_lowering(primitive, mlir.lower_fun(cpu, multiple_results=False), platform="cpu")
  mlir.register_lowering(primitive, mlir.lower_fun(jax.vmap(other), multiple_results=False))
  return primitive


# A shared kernel: the images of all tasks are one batch, N. Shared images: the kernels are one, F.
_conv = _primitive("conv3x3", _shape_f, _cpu_f, _lax_conv, alone=((1, 1), (4, 4)))
_kernel_gradient = _primitive(
  "conv3x3_kernel_gradient", _shape_g, _cpu_g, _lax_kernel_gradient, alone=((4, 3), (4, 4))
)

_rot = lambda kernel: kernel[:, ::-1, ::-1].swapaxes(3, 4)
_conv_in_x = lambda y, _, kernel: _conv.bind(y, _rot(kernel))
_conv_in_kernel = lambda y, x, _: _kernel_gradient.bind(x, y)
_kernel_gradient_in_x = lambda kernel, _, y: _conv.bind(y, _rot(kernel))
_kernel_gradient_in_y = lambda kernel, x, _: _conv.bind(x, kernel)
ad.defbilinear(_conv, _conv_in_x, _conv_in_kernel)
ad.defbilinear(_kernel_gradient, _kernel_gradient_in_x, _kernel_gradient_in_y)
