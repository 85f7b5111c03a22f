"""Tests of the distortions of pictures."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets import distortions


def blobs(side=32) -> jnp.ndarray:
  """Two soft spots [side, side], one above and one below to the right."""
  y, x = jnp.meshgrid(*2 * [(jnp.arange(side) + 0.5) / side - 0.5], indexing="ij")
  return jnp.exp(-((y + 0.1) ** 2 + x**2) / 0.005) + jnp.exp(
    -((y - 0.15) ** 2 + (x - 0.1) ** 2) / 0.005
  )


def plain_resample(image, size):
  return distortions._resample(image, size, jnp.eye(2), jnp.zeros(2))


def centre(image):
  """Centre of mass (y, x), as a part of the side, from the middle."""
  image = np.asarray(image, np.float64)
  grid = (np.arange(len(image)) + 0.5) / len(image) - 0.5
  return np.array([image.sum(1) @ grid, image.sum(0) @ grid]) / image.sum()


class DistortionTest(parameterized.TestCase):
  @parameterized.parameters(8, 16, 32)
  def test_no_distortion_is_the_area_mean(self, size):
    image = jax.random.uniform(jax.random.key(0), [32, 32])
    f = 32 // size
    want = image.reshape(size, f, size, f).mean(axis=(1, 3))
    np.testing.assert_allclose(plain_resample(image, size), want, atol=1e-6)

  def distort(self, size=16, **kwargs):
    """One draw of extreme values, which `kwargs` give in units of the configuration."""
    names = ("stroke", "angle", "shear", "scale", "down", "right")
    draws = jnp.array([kwargs.get(name, 0.0) for name in names])
    distortion = distortions.from_draws(distortions.Distortions(), draws)
    return distortions.distort(size, blobs(), distortion)

  def test_translation_and_scale(self):
    start = centre(self.distort())
    np.testing.assert_allclose(centre(self.distort(down=1.0)), start + [0.1, 0.0], atol=1e-3)
    np.testing.assert_allclose(centre(self.distort(right=-1.0)), start + [0.0, -0.1], atol=1e-3)
    for sign, scale in ((-1.0, 0.8), (1.0, 1.2)):
      got = self.distort(scale=sign)
      np.testing.assert_allclose(got.sum() / self.distort().sum(), scale**2, rtol=0.02)
      np.testing.assert_allclose(centre(got), scale * start, atol=2e-3)

  @parameterized.parameters(-1.0, 1.0)
  def test_rotation_and_shear_move_the_centre_as_the_matrix_says(self, sign):
    y, x = centre(self.distort(size=32))
    angle = np.deg2rad(20.0 * sign)
    want = [np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x]
    np.testing.assert_allclose(centre(self.distort(size=32, angle=sign)), want, atol=2e-3)
    want = [y, x + np.tan(np.deg2rad(10.0 * sign)) * y]
    np.testing.assert_allclose(centre(self.distort(size=32, shear=sign)), want, atol=2e-3)

  def test_strokes(self):
    square = jnp.zeros((9, 9)).at[3:6, 3:6].set(1.0)
    for amount, ink in ((0.0, 9.0), (1.0, 25.0), (-1.0, 1.0), (0.5, 17.0), (-0.5, 5.0)):
      got = distortions._thicken(square, jnp.float32(amount))
      np.testing.assert_allclose(got.sum(), ink, rtol=1e-6)
    np.testing.assert_array_equal(distortions._thicken(jnp.ones((4, 4)), jnp.float32(-1.0)), 1.0)

  def test_outside_is_paper(self):
    image = jnp.ones((32, 32))
    got = distortions._resample(image, 16, jnp.eye(2), jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(got[:7], 0.0, atol=1e-6)
    np.testing.assert_allclose(got[9:, 2:-2], 1.0, atol=1e-6)

  def test_full_turns_reach_every_angle_and_scale(self):
    limits = distortions.Distortions(180.0, 0.2, (0.8, 1.2), 0.0, 0.0)
    draws = jax.random.uniform(
      jax.random.key(0), [4000, distortions.DRAWS], minval=-1.0, maxval=1.0
    )
    drawn = jax.vmap(lambda draw: distortions.from_draws(limits, draw))(draws)
    self.assertIsNone(drawn.stroke)
    inverse = np.asarray(drawn.inverse)
    scale = np.linalg.det(inverse) ** -0.5
    np.testing.assert_allclose([scale.min(), scale.max()], [0.8, 1.2], atol=2e-3)
    # A rotation over a scale and nothing else: its columns are orthogonal and equally long.
    gram = np.swapaxes(inverse, 1, 2) @ inverse * scale[:, None, None] ** 2
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), gram.shape), atol=1e-5)
    quarters = np.histogram(np.arctan2(inverse[:, 0, 1], inverse[:, 0, 0]), 4, (-np.pi, np.pi))[0]
    np.testing.assert_allclose(quarters, 1000, atol=5 * (4000 * 3 / 16) ** 0.5)
    shift = np.asarray(drawn.shift)
    np.testing.assert_allclose([shift.min(), shift.max()], [-0.2, 0.2], atol=1e-3)

  def test_randomly(self):
    images = jnp.stack([blobs(), blobs()])
    limits, key = distortions.Distortions(), jax.random.key(0)
    got = distortions.randomly(key, limits, images, 16)
    self.assertEqual(got.shape, (2, 16, 16))
    self.assertGreater(jnp.abs(got[0] - got[1]).max(), 0.1)  # of one picture, two distortions
    other = distortions.randomly(jax.random.key(1), limits, images, 16)
    self.assertGreater(jnp.abs(got - other).max(), 0.1)
    same = distortions.randomly(key, None, images, 16)
    np.testing.assert_allclose(same[1], images[1].reshape(16, 2, 16, 2).mean((1, 3)), atol=1e-6)
    self.assertIs(distortions.randomly(key, None, images, 32), images)

  @parameterized.parameters(
    dict(scale=(1.2, 0.8)),
    dict(scale=(0.0, 1.0)),
    dict(stroke=1.5),
    dict(rotation_degrees=-1.0),
    dict(translation=0.9),
    dict(shear_degrees=80.0),
  )
  def test_limits_out_of_range(self, **kwargs):
    with self.assertRaisesRegex(ValueError, f"{next(iter(kwargs))}.*Change them"):
      distortions.Distortions(**kwargs)

  def test_words(self):
    self.assertEqual(
      str(distortions.Distortions(180.0, 0.2, (0.8, 1.2), 0.0, 0.0)),
      "rotation ±180°, translation ±0.2, scale 0.8-1.2",
    )
    self.assertEndsWith(str(distortions.Distortions()), "shear ±10°, strokes ±0.5 pixels")


if __name__ == "__main__":
  absltest.main()
