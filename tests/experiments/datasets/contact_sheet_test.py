"""Tests of the pictures of tasks."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

import shrinkmeta as sm
from experiments.datasets import few_shot
from experiments.datasets.contact_sheet import contact_sheet


class ContactSheetTest(absltest.TestCase):
  def test_rows_are_classes(self):
    images = jnp.arange(1, 16.0).reshape(3, 5, 1, 1, 1) / 255.0
    images = jnp.broadcast_to(images, (3, 5, 8, 8, 1))
    task = sm.Task(few_shot.by_class(images[:, :2]), few_shot.by_class(images[:, 2:]))
    sheet = contact_sheet(task)
    self.assertEqual(sheet.shape, (3 * 9, 2 * 9 + 3 + 3 * 9))
    self.assertEqual(sheet.dtype, np.uint8)
    codes = np.rint(255 * np.asarray(task.train.inputs)[:, 4, 4, 0]).reshape(3, 2)
    np.testing.assert_array_equal(255 - sheet[4::9, 4:18:9], codes)
    codes = np.rint(255 * np.asarray(task.val.inputs)[:, 4, 4, 0]).reshape(3, 3)
    np.testing.assert_array_equal(255 - sheet[4::9, 25::9], codes)
    np.testing.assert_array_equal(
      contact_sheet(task, columns=1), sheet[:, [*range(9), 18, 19, 20, *range(21, 30)]]
    )
    with self.assertRaisesRegex(ValueError, "one task"):
      contact_sheet(jax.tree.map(lambda leaf: leaf[None], task))

  def test_colours_are_shown_as_they_are(self):
    images = jnp.zeros((2, 2, 4, 4, 3)).at[1, :, :, :, 0].set(1.0)
    batch = few_shot.by_class(images)
    sheet = contact_sheet(sm.Task(batch, batch))
    self.assertEqual(sheet.shape, (10, 23, 3))
    np.testing.assert_array_equal(sheet[1, 1], [0, 0, 0])
    np.testing.assert_array_equal(sheet[6, 1], [255, 0, 0])


if __name__ == "__main__":
  absltest.main()
