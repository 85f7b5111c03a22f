"""Sources of tasks: epochs, splits, shapes, and the arguments of `fit`."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.data.source import source

KEY = jax.random.key(7)
SIZES = (2, 5, 9, 12, 3, 20)


def batches(sizes=SIZES):
  """Example n of task t is 100 t + n + 1, so that an example names its task."""
  numbers = [100 * t + np.arange(1.0, n + 1) for t, n in enumerate(sizes)]
  return [sm.Batch({"x": x[:, None]}, x.astype(np.int32)) for x in numbers]


def examples(task, t):
  """The examples of train and of val of the task in place t, without padding."""
  parts = [part for part in task if part is not None]
  return [np.asarray(part.targets[t])[np.asarray(part.mask[t]) > 0].tolist() for part in parts]


def test_an_epoch_takes_every_task_once_in_a_new_order():
  draw = source(batches(), rows=(4, 4), key=KEY)
  orders = []
  for epoch in range(4):
    tasks = draw(6 * epoch, 6)
    orders.append([examples(tasks, t)[0][0] // 100 for t in range(6)])
    assert sorted(orders[-1]) == list(range(6))
  assert len(set(map(tuple, orders))) > 1


@pytest.mark.parametrize("split", ["random", "fixed"])
@pytest.mark.parametrize("buckets", [None, 3])
def test_an_episode_does_not_depend_on_its_meta_batch(split, buckets):
  draw = source(batches(), rows=(4, 4), key=KEY, split=split, buckets=buckets)
  again = source(batches(), rows=(4, 4), key=KEY, split=split, buckets=buckets)
  one_by_one = [examples(again(i, 1), 0) for i in reversed(range(18))][::-1]
  for first, count in ((0, 18), (5, 9)):
    tasks = draw(first, count)
    assert [examples(tasks, t) for t in range(count)] == one_by_one[first : first + count]


def test_small_integers_of_numpy_do_not_wrap_around():
  """np.uint8(200) + np.uint8(100) is 44."""
  plain = source(batches([400]), rows=(200, 100), key=KEY)(255, 2)
  small = source(batches([400]), rows=(np.uint8(200), np.uint8(100)), key=KEY)
  chex.assert_trees_all_equal(small(np.uint8(255), np.uint8(2)), plain)


def test_a_split_is_disjoint_and_new_in_every_epoch_unless_fixed():
  for split, kinds in (("random", 2), ("fixed", 1)):
    draw = source(batches(), rows=(4, 4), key=KEY, split=split)
    seen = {t: set() for t in range(6)}
    for i in range(36):
      train, val = examples(draw(i, 1), 0)
      task = int(train[0] // 100)
      assert not set(train) & set(val) and train and val
      assert {int(x // 100) for x in train + val} == {task}
      assert len(train) + len(val) == min(8, SIZES[task])
      seen[task].add((tuple(train), tuple(val)))
    assert len(seen[5]) >= kinds if split == "random" else len(seen[5]) == 1


def test_padding_is_zero_and_masked_and_inputs_follow_targets():
  tasks = source(batches(), rows=(4, 4), key=KEY)(0, 6)
  for part, counts in zip(tasks, ((1, 1, 2, 4, 4, 4), (1, 2, 3, 4, 4, 4)), strict=True):
    assert tuple(sorted(part.mask.sum(1).tolist())) == counts  # halves of 2, 3 and 5 examples
    chex.assert_shape(part.inputs["x"], (6, 4, 1))
    np.testing.assert_array_equal(part.inputs["x"][..., 0], part.targets)
    np.testing.assert_array_equal(np.asarray(part.targets) > 0, part.mask)


@pytest.mark.parametrize("buckets", [1, 2, 3, 10])
def test_buckets_bound_the_number_of_shapes(buckets):
  draw = source(batches(), rows=(10, 10), key=KEY, buckets=buckets)
  shapes = {tuple(part.targets.shape[1] for part in draw(i, 2)) for i in range(24)}
  assert 1 <= len(shapes) <= buckets and (buckets == 1 or len(shapes) > 1)


def test_examples_of_mask_0_are_left_out_and_weights_are_kept():
  mask = jnp.array([0.0, 2.0, 0.0, 2.0, 2.0])
  batch = sm.Batch(jnp.arange(5.0), jnp.arange(5), mask)
  train, val = source([batch], rows=(2, 1), key=KEY)(0, 1)
  assert sorted([*train.targets[0].tolist(), *val.targets[0].tolist()]) == [1, 3, 4]
  assert train.mask.tolist() == [[2.0, 2.0]]


def test_tasks_are_used_as_they_are_and_val_may_be_missing():
  small, large = batches((3, 6)), batches((2, 4))
  pairs = [sm.Task(train, val) for train, val in zip(small, large, strict=True)]
  tasks = source(pairs, key=KEY)(0, 2)
  chex.assert_shape(tasks.train.targets, (2, 6))
  chex.assert_shape(tasks.val.targets, (2, 4))
  first = int(examples(tasks, 0)[0][0] // 100)
  assert examples(tasks, 0) == [part.targets.tolist() for part in pairs[first]]
  assert source([task._replace(val=None) for task in pairs], key=KEY)(0, 2).val is None
  assert source(batches(), rows=(3, 0), key=KEY)(0, 2).val is None


def test_a_shape_fits_both_parts_of_all_its_tasks():
  """The task with most examples has the shorter training part."""
  trains, vals = batches((6, 2)), batches((1, 7))
  pairs = [sm.Task(train, val) for train, val in zip(trains, vals, strict=True)]
  tasks = source(pairs, key=KEY)(0, 2)
  chex.assert_shape((tasks.train.targets, tasks.val.targets), [(2, 6), (2, 7)])
  want = [[part.targets.tolist() for part in pair] for pair in pairs]
  assert sorted(examples(tasks, t) for t in range(2)) == sorted(want)


def test_fit_takes_tasks_and_a_fixed_set_of_tasks():
  linear = sm.gaussian(lambda theta, x: x @ theta["w"])
  learner = sm.sigma_imaml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 5))
  state = learner.init({"w": jnp.zeros(2)})
  rng = np.random.default_rng(0)
  draw = lambda: sm.Batch(
    *(jnp.array(rng.normal(size=s), jnp.float32) for s in ((4, 3, 2), (4, 3)))
  )
  fixed = sm.Task(draw(), draw())
  as_list = [jax.tree.map(lambda x, i=i: x[i], fixed) for i in range(4)]
  ended = [sm.fit(learner, state, tasks, 3, meta_batch=2) for tasks in (fixed, as_list)]
  chex.assert_trees_all_equal(*ended)
  key = jax.random.fold_in(jax.random.key(0), 2**32 - 1)
  written_out = sm.fit(learner, state, source(fixed, key=key), 3, meta_batch=2)
  chex.assert_trees_all_equal(ended[0], written_out)
  assert not np.array_equal(ended[0].phi["w"], state.phi["w"])


def other(i, batch):
  return [*itertools.chain(batches()[:i], [batch], batches()[i + 1 :])]


GOOD = batches()[0]
KEYS = jax.random.split(KEY, len(GOOD.targets))


@pytest.mark.parametrize(
  ("tasks", "keywords", "message"),
  [
    (other(3, batches((1,))[0]), {}, r"tasks\[3\] has 1 example; a split needs 2"),
    (other(2, GOOD._replace(targets=np.ones(2))), {}, r"tasks\[2\]\.targets is float64 \['N'\]"),
    (
      other(1, GOOD._replace(inputs=np.ones((2, 1)))),
      {},
      r"tasks\[1\] and tasks\[0\] differ in str",
    ),
    (other(4, GOOD._replace(targets=np.ones(3))), {}, r"All leaves of tasks\[4\] must lead with"),
    (other(1, GOOD._replace(inputs=KEYS)), {}, r"tasks\[1\]/inputs holds random keys"),
    (
      sm.Task(sm.Batch(KEYS[None], np.ones((1, 2))), None),
      {"rows": None},
      r"tasks.train/inputs holds random keys",
    ),
    (other(1, 3), {}, r"tasks\[1\] must be a shrinkmeta.Batch, as tasks\[0\] is; got"),
    (
      [sm.Task(GOOD, GOOD), sm.Task(GOOD, None)],
      {"rows": None},
      r"tasks\[1\].val and tasks\[0\].val",
    ),
    ([sm.Task(GOOD, GOOD)], {}, r"got rows=\(4, 4\) and a list of Tasks"),
    (batches(), {"rows": None}, "A list of Batches needs rows=.*; got rows=None"),
    (batches(), {"rows": (0, 4)}, r"rows\[0\]"),
    (batches(), {"rows": 4}, r"rows must be \(examples of train, examples of val\); got"),
    (batches(), {"split": "half"}, 'split must be "random" or "fixed"; got \'half\''),
    (batches(), {"buckets": 0}, "buckets"),
    (batches(), {"key": 0}, "key must be a key of jax.random.key"),
    (GOOD, {}, "tasks must be a list with one shrinkmeta.Batch or shrinkmeta.Task a task"),
    ([], {}, "tasks is an empty list"),
  ],
)
def test_errors_say_which_task_and_which_part(tasks, keywords, message):
  with pytest.raises((TypeError, ValueError), match=message):
    source(tasks, **({"key": KEY, "rows": (4, 4)} | keywords))


@pytest.mark.parametrize(
  "first, count, name", ((-1, 2, "first"), (0, 0, "count"), (0.5, 1, "first"))
)
def test_a_source_is_asked_for_episodes_that_exist(first, count, name):
  with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
    source(batches(), key=KEY, rows=(4, 4))(first, count)
