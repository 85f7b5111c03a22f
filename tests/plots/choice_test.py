import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.choice.tables import CurvePoint, ModuleLoss
from tests.plots.drawn import LONG, check_texts

pytest.importorskip("matplotlib")


def choice(names):
  rng = np.random.default_rng(0)
  rows = [
    ModuleLoss(m, 0.3, 0.2, 10, 40, *rng.uniform(1, 1.5, 1), 0.03, *rng.uniform(0.8, 1, 1), 0.02)
    for m in names
  ]
  points = [
    CurvePoint(m, names[: i + 1], 1.5 - 0.1 * i, 0.02, (i + 1) / len(names), 10, 40, 0.1)
    for i, m in enumerate(names)
  ]
  points.insert(0, CurvePoint(None, (), 2.0, 0.02, 0.0, 0, 0, 0.1))
  return sm.Choice(names[:2], tuple(rows), tuple(points), 50, 0, None)


def test_the_picture_shows_losses_and_worth():
  found = choice(("b", "a", "c"))
  left, right = sm.plots.choice_curve(found).axes
  curve = left.containers[0].lines[0]
  np.testing.assert_allclose(curve.get_xdata(orig=False), [p.loss for p in found.curve])
  assert [t.get_text() for t in left.get_yticklabels()] == ["none", "+ b", "+ a", "+ c"]
  ring = next(line for line in left.lines if line.get_marker() == "s")
  assert (ring.get_xdata(), ring.get_ydata()) == ([found.curve[2].loss], [2])
  alone, missing = (container.lines[0] for container in right.containers)
  np.testing.assert_allclose(
    alone.get_xdata(orig=False), 2.0 - np.array([r.only for r in found.table])
  )
  worse = np.array([r.without for r in found.table]) - found.curve[-1].loss
  np.testing.assert_allclose(missing.get_xdata(orig=False), worse)
  assert [t.get_text() for t in right.get_yticklabels()] == ["b", "a", "c"]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_texts(count):
  names = tuple(LONG.format(i, i) if count > 3 else f"m{i}" for i in range(count))
  check_texts(sm.plots.choice_curve(choice(names)), "none", *names)
