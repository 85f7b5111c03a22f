import numpy as np
from absl.testing import absltest

from experiments.report.pictures import canvas


class LabelsTest(absltest.TestCase):
  def test_labels_keep_their_distance_order_and_bounds(self):
    y = np.array([0.5, 0.51, 0.0, 0.5, 0.99, 1.0])
    places = canvas.spread(y, 0.1, 0.05, 0.95)
    self.assertGreaterEqual(np.diff(np.sort(places)).min(), 0.1 - 1e-12)
    self.assertBetween(places.min(), 0.05, 0.95)
    self.assertBetween(places.max(), 0.05, 0.95 + 1e-12)
    np.testing.assert_array_equal(np.argsort(places), np.argsort(y, kind="stable"))
    far = np.array([0.2, 0.8, 0.5])
    np.testing.assert_allclose(canvas.spread(far, 0.1, 0.05, 0.95), far)


if __name__ == "__main__":
  absltest.main()
