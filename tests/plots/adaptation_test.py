import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.plots import adaptation, look
from tests.plots.drawn import check_texts

pytest.importorskip("matplotlib")


def evaluation(scale, accuracy=True, tasks=20, seed=0):
  loss = scale * np.exp(0.2 * np.random.default_rng(seed).normal(size=tasks))
  return sm.Evaluation(loss, np.exp(-loss) if accuracy else None, np.ones(tasks, bool))


def curves(*names, steps=(0, 1, 3, 10, 30, 100, 1000), **options):
  return {
    name: {s: evaluation(3 / (1 + i + np.log1p(s)), **options) for s in steps}
    for i, name in enumerate(names)
  }


def lines(ax):
  return [line for line in ax.lines if line.get_linewidth() == 1.5]


def test_lines_are_means_and_bands_are_intervals():
  found = curves("σ-iMAML", "_MAML $x$", "Reptile")
  figure = sm.plots.adaptation_curves(found)
  accuracy, loss = figure.axes
  want = [e.loss for e in found["_MAML $x$"].values()]
  np.testing.assert_allclose(lines(loss)[1].get_ydata(), [w.mean for w in want])
  vertices = loss.collections[1].get_paths()[0].vertices
  np.testing.assert_allclose(vertices[:, 1].max(), max(w.high for w in want))
  np.testing.assert_allclose(vertices[:, 1].min(), min(w.low for w in want))
  share = [100 * e.mean_accuracy.mean for e in found["Reptile"].values()]
  np.testing.assert_allclose(lines(accuracy)[2].get_ydata(), share)
  x = lines(loss)[0].get_xdata()
  np.testing.assert_allclose(x[1:], np.log10([1, 3, 10, 30, 100, 1000]))
  assert x[0] < x[1]
  check_texts(figure, *found, "1,000", "20 tasks")


def test_ten_learners_at_sixty_steps_without_accuracy():
  found = curves(*[f"learner {i}, by hand" for i in range(10)], steps=range(60), accuracy=False)
  figure = sm.plots.adaptation_curves(found, xlabel="examples of a task")
  assert len(figure.axes) == 1
  check_texts(figure, *found, "examples of a task")


def test_learners_may_have_other_steps_and_failed_tasks():
  lost = evaluation(1.0)
  lost.val_nll[:3] = np.inf
  found = curves("a", steps=(1, 10)) | {
    "b": {5: evaluation(1.0), 20: lost},
    "c": {1: evaluation(1.0)},
  }
  figure = sm.plots.adaptation_curves(found)
  check_texts(figure, "a", "b (3 of 20 failed)", "c")
  all_lost = sm.Evaluation(np.full(4, np.nan), None, np.zeros(4, bool))
  check_texts(sm.plots.adaptation_curves({"d": {0: all_lost}, **curves("e", accuracy=False)}), "e")


def test_a_point_without_a_neighbour_has_a_bar():
  lost = sm.Evaluation(np.full(20, np.nan), None, np.zeros(20, bool))
  points = {1: evaluation(1.0), 10: evaluation(0.5), 30: lost, 90: evaluation(0.4)}
  found = {"a": {s: e._replace(accuracy=None) for s, e in points.items()}}
  found["b"] = {5: evaluation(2.0, accuracy=False)}
  (ax,) = sm.plots.adaptation_curves(found).axes
  bars = [[s[:, 1] for s in c.lines[2][0].get_segments()] for c in ax.containers]
  for (drawn,), want in zip(bars, (found["a"][90], found["b"][5]), strict=True):
    np.testing.assert_allclose(drawn, [want.loss.low, want.loss.high])


@pytest.mark.parametrize(
  "steps, written",
  [
    ((0, 50, 90, 95, 100, 110, 1000), "0 50 90 1,000"),
    ((0, 10_000, 11_000, 11_500, 12_000), "0 10,000 12,000"),
    ((0, 1, 10, 100), "0 1 10 100"),
    ((5,), "5"),
  ],
)
def test_numbers_of_steps_do_not_overlap(steps, written):
  figure = sm.plots.adaptation_curves(curves("σ-iMAML", "a name that is long", steps=steps))
  check_texts(figure)
  ax = figure.axes[-1]
  assert " ".join(t for t in (t.get_text() for t in ax.get_xticklabels()) if t) == written
  assert len(ax.get_xticks()) == len(steps)  # and their lines of the grid


def test_one_task_is_no_tasks():
  found = {"a": {1: evaluation(1.0, tasks=1, accuracy=False)}}
  assert sm.plots.adaptation_curves(found).axes[0].get_xlabel().endswith("over 1 task)")


def test_one_diverging_learner_flattens_no_other():
  for lowest, scale in ((-0.2, "symlog"), (0.1, "log"), (-30.0, "symlog")):
    _, (ax,) = look.figure(3.0)
    means = np.array([1e18, 6_757.0, lowest, lowest + 0.5])
    ax.plot([0, 1], means[[0, 2]])
    ax.plot([0, 1], means[[1, 3]])
    ax.fill_between([0, 1], [-1e18, lowest], [3e18, lowest], alpha=0.1)
    adaptation._scale(ax, means)
    assert ax.get_yscale() == scale
    height = lambda y, ax=ax: ax.transAxes.inverted().transform(ax.transData.transform((0, y)))[1]
    assert height(lowest + 0.5) - height(lowest) > (0.05 if lowest > -1 else 0.0)
    assert height(6_757.0) > 1.0  # leaves the panel
    inside = [height(tick) for tick in ax.get_yticks()]
    assert all(-1e-6 <= y <= 1 + 1e-6 for y in inside), inside


@pytest.mark.parametrize(
  "wrong,words",
  [
    ({}, "it is empty"),
    ({"a": {-1: evaluation(1.0)}}, "must be 0 or more"),
    ({"a": {1: 2.0}}, r"evaluations\['a'\]\[1\] must be a shrinkmeta.Evaluation"),
  ],
)
def test_refuses_what_it_cannot_draw(wrong, words):
  with pytest.raises((TypeError, ValueError), match=words):
    sm.plots.adaptation_curves(wrong)
