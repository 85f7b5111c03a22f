"""Random affine maps and stroke widths of pictures, computed on the device."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

DRAWS = 6  # numbers that one distortion takes


@dataclasses.dataclass(frozen=True)
class Distortions:
  """How far pictures are distorted."""

  rotation_degrees: float = 20.0  # angles are uniform in +- this
  translation: float = 0.1  # uniform in +- this part of the picture, in both directions
  scale: tuple[float, float] = (0.8, 1.2)  # uniform between these
  shear_degrees: float = 10.0  # uniform in +- this
  stroke: float = 0.5  # 0 leaves the strokes, 1 makes them up to a stored pixel thicker or thinner

  def __post_init__(self):
    low, high = self.scale
    for ok, wanted in (
      (0 <= self.rotation_degrees <= 180, "rotation_degrees in [0, 180]"),
      (0 <= self.translation <= 0.5, "translation in [0, 0.5]"),
      (0 < low <= high, "scale (low, high) with 0 < low <= high"),
      (0 <= self.shear_degrees <= 45, "shear_degrees in [0, 45]"),
      (0 <= self.stroke <= 1, "stroke in [0, 1]"),
    ):
      if not ok:
        raise ValueError(f"Distortions want {wanted}; got {self}. Change them.")

  def __str__(self) -> str:
    low, high = self.scale
    parts = [
      f"rotation ±{self.rotation_degrees:g}°",
      f"translation ±{self.translation:g}",
      f"scale {low:g}-{high:g}",
    ]
    parts += [f"shear ±{self.shear_degrees:g}°"] if self.shear_degrees else []
    parts += [f"strokes ±{self.stroke:g} pixels"] if self.stroke else []
    return ", ".join(parts)


class Distortion(NamedTuple):
  """The distortion of one picture; coordinates (y, x) are centred, in units of the picture's side.

  It moves the point p to scale * R(angle) @ [[1, 0], [shear, 1]] @ p + shift.
  """

  stroke: jax.Array | None  # [] in [-1, 1], thinner or thicker; None leaves the strokes
  inverse: jax.Array  # [2, 2] from where something is to where it was, after the shift
  shift: jax.Array  # [2]


def identity() -> Distortion:
  """Return the distortion that changes nothing."""
  return Distortion(None, jnp.eye(2), jnp.zeros(2))


def randomly(key: jax.Array, limits: Distortions | None, images: jax.Array, size: int) -> jax.Array:
  """Distort each picture anew, [N, H, W] -> [N, size, size]; with None only resize them."""
  if limits is None and images.shape[1:] == (size, size):
    return images
  if limits is None:
    return jax.vmap(lambda image: distort(size, image, identity()))(images)
  draws = jax.random.uniform(key, [len(images), DRAWS], minval=-1.0, maxval=1.0)
  return jax.vmap(lambda image, draw: distort(size, image, from_draws(limits, draw)))(images, draws)


def from_draws(limits: Distortions, draws: jax.Array) -> Distortion:
  """Return the distortion for `draws` [DRAWS], each in [-1, 1]."""
  stroke, angle, shear, scale = draws[:4]
  low, high = limits.scale
  scale = 0.5 * (low + high) + 0.5 * (high - low) * scale
  angle = jnp.deg2rad(limits.rotation_degrees) * angle
  shear = jnp.tan(jnp.deg2rad(limits.shear_degrees) * shear)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  unshear = jnp.stack([jnp.ones_like(shear), jnp.zeros_like(shear), -shear, jnp.ones_like(shear)])
  unrotate = jnp.stack([cos, sin, -sin, cos])
  inverse = unshear.reshape(2, 2) @ unrotate.reshape(2, 2) / scale
  thicker = limits.stroke * stroke if limits.stroke else None
  return Distortion(thicker, inverse, limits.translation * draws[4:])


def distort(size: int, image: jax.Array, distortion: Distortion) -> jax.Array:
  """Distort one picture, [H, W] -> [size, size]: first the strokes, then the affine map."""
  if distortion.stroke is not None:
    image = _thicken(image, distortion.stroke)
  return _resample(image, size, distortion.inverse, distortion.shift)


def _thicken(image: jax.Array, amount: jax.Array) -> jax.Array:
  """Blend an image [H, W] with its 3 x 3 grey dilation (amount 1) or erosion (amount -1)."""
  sign = jnp.where(amount < 0, -1.0, 1.0)  # erosion is dilation of the negative
  wide = sign * image
  for window in ((3, 1), (1, 3)):
    wide = jax.lax.reduce_window(wide, -jnp.inf, jax.lax.max, window, (1, 1), "SAME")
  return image + jnp.abs(amount) * (sign * wide - image)


def _resample(image: jax.Array, size: int, inverse: jax.Array, shift: jax.Array) -> jax.Array:
  """Return [size, size] pixels of an image [H, W] moved by a distortion; outside is paper."""
  # A mean over as many stored pixels as a new one covers comes before sampling, against aliasing.
  # A product of matrices, as XLA fuses plain sums into the sampling and redoes them for each pixel
  # (docs/hazards.md#fused-sums), in full precision (docs/hazards.md#rounded-products).
  width = max(1, round(image.shape[0] / size))
  means = [jnp.tri(n + width - 1, n) - jnp.tri(n + width - 1, n, -width) for n in image.shape]
  smooth = jnp.linalg.multi_dot(
    [means[0] / width, image, means[1].T / width], precision=jax.lax.Precision.HIGHEST
  )
  grid = (jnp.arange(size) + 0.5) / size - 0.5
  y, x = jnp.meshgrid(grid - shift[0], grid - shift[1], indexing="ij")
  y, x = (inverse[i, 0] * y + inverse[i, 1] * x for i in (0, 1))
  # Pixel i is centred at (i + 1/2) / H - 1/2; the padded mean has its pixels (width - 1) / 2 on.
  rows, columns = (
    (p + 0.5) * n - 0.5 + 0.5 * (width - 1) for p, n in ((y, image.shape[0]), (x, image.shape[1]))
  )
  return jax.scipy.ndimage.map_coordinates(smooth, [rows, columns], order=1, mode="constant")
