import numpy as np
import pytest

pytest.importorskip("matplotlib")

from shrinkmeta.plots import line_names, look
from tests.plots.drawn import check_texts


def test_places_keep_their_distance_order_and_bounds():
  y = np.array([0.5, 0.51, 0.0, 0.5, 0.99, 1.0])
  places = line_names.spread(y, 0.1, 0.05, 0.95)
  assert np.diff(np.sort(places)).min() >= 0.1 - 1e-12
  assert places.min() >= 0.05 and places.max() <= 0.95 + 1e-12
  np.testing.assert_array_equal(np.argsort(places), np.argsort(y, kind="stable"))
  far = np.array([0.2, 0.8, 0.5])
  np.testing.assert_allclose(line_names.spread(far, 0.1, 0.05, 0.95), far)


def test_names_follow_the_lines_into_another_layout():
  figure, panels = look.figure(6.0, 2, 1)
  lines = {f"line {i}": panels[0].plot([0, 1], [0, 0.01 * i])[0] for i in range(8)}
  lines["lost"] = panels[0].plot([0, 1], [np.nan, np.nan])[0]
  line_names.name_ends(panels[0], lines)
  check_texts(figure, *list(lines)[:8])
  assert not any(t.get_text() == "lost" for t in panels[0].texts)
  figure.set_size_inches(5.0, 5.0)
  panels[0].set_ylim(0, 0.2)  # all ends move to the lower third
  check_texts(figure, *list(lines)[:8])
  height = lambda name: next(t.get_position()[1] for t in panels[0].texts if t.get_text() == name)
  assert height("line 0") < height("line 1") < height("line 7") < 0.95
