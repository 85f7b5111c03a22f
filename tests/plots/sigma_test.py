import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.plots import sigma
from tests.plots.drawn import LONG, check_texts

pytest.importorskip("matplotlib")


def names(count):
  return [LONG.format(i, i) if count > 3 else f"conv_{i}" for i in range(count)]


def draw(count, seed):
  rng = np.random.default_rng(seed)
  return dict(zip(names(count), np.exp(rng.normal(-1, 1, count)).tolist(), strict=True))


def test_dots_are_seeds_and_bars_are_geometric_means():
  seeds = [{"body": 0.1, "head": 1.0}, {"body": 0.4, "head": 1.0}]
  (ax,) = sm.plots.sigma_by_module(seeds).axes
  dots, bars = ax.collections
  x = np.asarray(dots.get_offsets())[:, 0].reshape(2, 2)  # [seeds, modules]
  np.testing.assert_allclose(x, [[0.1, 1.0], [0.4, 1.0]])
  y = np.asarray(dots.get_offsets())[:, 1].reshape(2, 2)
  assert y[0, 1] != y[1, 1]  # equal seeds stay visible
  np.testing.assert_allclose([s[0, 0] for s in bars.get_segments()], [0.2, 1.0])


def test_summaries_serve_as_runs():
  summary = sm.module_summary({"w": "body"}, {"w": jnp.zeros(2)}, {"body": jnp.log(0.25)})
  listed = list(summary)
  several = (listed, [listed], {"one": listed}, {"one": [listed]})
  for runs in (summary, [summary], {"one": [summary]}, {"body": 0.5}, *several):
    (ax,) = sm.plots.sigma_by_module(runs).axes
    np.testing.assert_allclose(ax.collections[0].get_offsets()[0, 0], 0.5, rtol=1e-6)


@pytest.mark.parametrize("count", [3, 40])
def test_texts_of_sigma_by_module(count):
  runs = {name: [draw(count, s) for s in range(3)] for name in ("σ-iMAML", "_σ-MAML $a$")}
  check_texts(sm.plots.sigma_by_module(runs), *names(count), *runs)


@pytest.mark.parametrize(
  "changes",
  [
    {"conv_0": 0.0, "conv_2": math.inf},
    dict.fromkeys(names(3), 0.0),
    dict.fromkeys(names(3), math.inf),
    dict.fromkeys(names(3), 0.1),
    {"conv_2": math.nan},
  ],
)
def test_sigma_at_its_limits(changes):
  run = draw(3, 0) | changes
  check_texts(sm.plots.sigma_by_module([run, draw(3, 1)]), *run)
  records = [{f"sigma/{m}": s for m, s in one.items()} for one in (draw(3, 1), run)]
  check_texts(sm.plots.sigma_history(records), *[m for m in run if run[m] == run[m]])


def test_the_scale_keeps_0_and_inf_beyond_the_others():
  every = np.array([0.0, 0.1, 0.4, np.inf])
  placed = sigma._scale(every).place(every)
  assert np.all(np.isfinite(placed)) and np.all(np.diff(placed) > 0)
  assert placed[1:3].tolist() == [0.1, 0.4]


def records(count, seed, steps=20):
  end = draw(count, seed)
  at = lambda s, e: 0.3 ** (1 - s / steps) * e ** (s / steps)
  return [{"step": s, **{f"sigma/{m}": at(s, e) for m, e in end.items()}} for s in range(steps)]


@pytest.mark.parametrize("count", [3, 40])
def test_texts_of_sigma_history(count):
  check_texts(sm.plots.sigma_history(records(count, 0)), *names(count))


def test_history_shows_seeds_and_their_mean_and_learners():
  short = records(3, 1, steps=10)
  figure = sm.plots.sigma_history({"a": [records(3, 0), short], "b": records(3, 2)})
  first, second = figure.axes
  thick = [line for line in first.lines if line.get_linewidth() == 1.7]
  assert [len(line.get_xdata()) for line in thick] == [10, 10, 10]
  both = [run[9]["sigma/conv_1"] for run in (records(3, 0), short)]
  np.testing.assert_allclose(thick[1].get_ydata()[9], np.sqrt(np.prod(both)))
  assert (
    len([line for line in first.lines if line.get_linewidth() == 0.6 and line.get_zorder() > 1])
    == 6
  )
  assert first.get_ylim() == second.get_ylim()
  check_texts(figure, "a", "b")


def test_an_update_without_a_neighbour_has_a_dot():
  for seeds, at in ([records(3, 0, steps=1)], [0]), ([records(3, 0), records(3, 1)], []):
    (ax,) = sm.plots.sigma_history(seeds).axes
    thick = [line for line in ax.lines if line.get_linewidth() == 1.7]
    assert [line.get_markevery() for line in thick] == [at] * 3
    assert {line.get_marker() for line in thick} == {"o"}


def test_fit_draws_its_sigma(tmp_path):
  learner = sm.sigma_maml(
    sm.gaussian(lambda p, x: x * p["w"]), {"w": "body"}, inner=sm.Inner(optax.sgd(0.1), 1)
  )
  batch = lambda count: sm.Batch(jnp.ones((count, 4)), jnp.ones((count, 4)))
  tasks = lambda first, count: sm.Task(batch(count), batch(count))
  found, file = [], tmp_path / "sigma.svg"
  calls = [sm.recorder(found), sm.plots.sigma_picture(file, every=1)]
  sm.fit(learner, learner.init({"w": 0.0}), tasks, 2, meta_batch=3, callbacks=calls)
  assert "sigma/body" in found[1] and "body" in file.read_text()
  (ax,) = sm.plots.sigma_history(found).axes
  line = next(line for line in ax.lines if line.get_linewidth() == 1.7)
  np.testing.assert_allclose(line.get_ydata(), [r["sigma/body"] for r in found])
  assert line.get_xdata().tolist() == [0, 1]


def test_the_mean_is_over_the_updates_that_all_seeds_have():
  a, b = records(3, 0, steps=100), records(3, 1, steps=100)[50:]
  (ax,) = sm.plots.sigma_history([a, b]).axes
  thick = [line for line in ax.lines if line.get_linewidth() == 1.7]
  assert thick[1].get_xdata().tolist() == list(range(50, 100))
  both = [[record["sigma/conv_1"] for record in run] for run in (a[50:], b)]
  np.testing.assert_allclose(thick[1].get_ydata(), np.sqrt(np.prod(both, 0)))
  with pytest.raises(ValueError, match="must have updates in common; got none. .*join their log"):
    sm.plots.sigma_history([a[:50], b])


def test_of_two_records_of_an_update_the_later_one_is_drawn():
  again = [{"step": s, "sigma/body": 2.0} for s in (1, 2)]
  (ax,) = sm.plots.sigma_history([{"step": s, "sigma/body": 1.0} for s in (0, 1)] + again).axes
  line = next(line for line in ax.lines if line.get_linewidth() == 1.7)
  assert line.get_xdata().tolist() == [0, 1, 2] and line.get_ydata().tolist() == [1.0, 2.0, 2.0]


def test_a_picture_makes_its_folder_before_the_first_update(tmp_path):
  file = tmp_path / "pics" / "sigma.svg"
  callback = sm.plots.sigma_picture(file)
  callback.begin(0, 1)
  assert list(file.parent.iterdir()) == []
  callback.record(0, {"sigma/body": 0.3})
  callback.end()
  assert "body" in file.read_text()
  (tmp_path / "folder.svg").mkdir()
  for wrong in (file / "sigma.svg", tmp_path / "folder.svg"):
    with pytest.raises(OSError, match=f"{wrong} cannot be written: .*Name another file"):
      sm.plots.sigma_picture(wrong).begin(0, 1)


def test_refuses_what_it_cannot_draw(tmp_path):
  with pytest.raises(ValueError, match='No log record in runs has a number "sigma/<module>"'):
    sm.plots.sigma_history([{"loss": 1.0}])
  with pytest.raises(TypeError, match="sigma >= 0"):
    sm.plots.sigma_by_module([{"body": -0.1}])
  with pytest.raises(ValueError, match="path must end in"):
    sm.plots.sigma_picture(tmp_path / "sigma.word")
  callback = sm.plots.sigma_picture(tmp_path / "none.png")
  callback.record(0, {"loss": 1.0})
  callback.end()
  assert not (tmp_path / "none.png").exists()
