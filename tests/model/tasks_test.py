from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.model.tasks import check_batch, check_tasks, num_examples, weights

X = jnp.ones([2, 4, 3])
Y = jnp.ones([2, 4])
GOOD = sm.Batch(X, Y)
ANY: Any = sm  # for arguments of wrong types


def test_weights_and_counts():
  batch = sm.Batch(jnp.ones([3, 2]), jnp.ones([3]), jnp.array([True, False, True]))
  np.testing.assert_array_equal(weights(batch, jnp.float32), [1.0, 0.0, 1.0])
  assert num_examples(batch, jnp.float32) == 2.0
  assert num_examples(batch._replace(mask=None), jnp.float32) == 3.0


def test_good_batches_pass():
  check_batch("batch", GOOD, ("T", "N"))
  check_batch("batch", sm.Batch({"a": X, "b": Y}, Y, Y), ("T", "N"))
  check_batch("batch", sm.Batch(jnp.ones([4]), jnp.ones([4], int), jnp.ones([4], bool)))
  check_tasks(sm.Task(GOOD, sm.Batch(X[:, :1], Y[:, :1])))
  check_tasks(sm.Task(sm.Batch(np.ones([2, 4]), np.ones([2, 4])), GOOD))  # NumPy arrays too


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    (sm.Batch(None, Y), r"b has no inputs or no targets"),
    (sm.Batch(X, {}), r"b has no inputs or no targets"),
    (sm.Batch(X[:, :3], Y), r"b/inputs leads with \(2, 3\), b/targets has shape \(2, 4\)"),
    (sm.Batch({"a": X, "b": X[:1]}, Y), r"b/inputs/a leads with \(2, 4\), b/inputs/b has shape"),
    (sm.Batch(X, jnp.ones([2])), r"b/targets must lead with \[T, N, ...\]; its shape is \(2,\)"),
    (sm.Batch(X[:, :0], Y[:, :0]), r"b is empty: b/inputs leads with \[T, N, ...\] = \(2, 0\)"),
    (sm.Batch(X, Y, X), r"b.mask must have shape \(2, 4\); got \(2, 4, 3\)"),
    (sm.Batch(X, Y, Y.at[1].set(0)), r"b.mask of tasks \[1\] is 0 everywhere"),
    (sm.Batch(X.at[1, 2, 0].set(jnp.nan), Y), r"b/inputs.*1 NaN .*index \(1, 2, 0\): nan"),
    (sm.Batch(X, Y.at[0, 3].set(-jnp.inf)), r"b/targets.*1 NaN or inf.*index \(0, 3\): -inf"),
    (sm.Batch(X, Y, Y.at[0, 3].set(jnp.nan)), r"b/mask.*NaN"),
  ],
)
def test_bad_batches(batch, message):
  with pytest.raises(ValueError, match=message):
    check_batch("b", batch, ("T", "N"))


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    (
      (X, Y),
      r"b must be a shrinkmeta.Batch\(inputs, targets, mask\); got a tuple.*Wrap the arrays",
    ),
    (None, r"b must be a shrinkmeta.Batch.*; got None"),
    ([GOOD, GOOD], r"b must be a shrinkmeta.Batch.*a list of 2 items. Stack them: sm.stack_batch"),
    (sm.Task(GOOD, GOOD), r"got Task\(train=..., val=...\). Pass one part of it: b.train or b.val"),
    (
      sm.Batch([[1.0, 2.0]], Y),
      r"b/inputs/0/0 must be an array that leads with .* got 1.0. Make an",
    ),
    (sm.Batch(X, {"y": "five"}), r"b/targets/y must be an array .* got 'five'"),
    (
      ANY.Batch(X, Y, [[1.0] * 4] * 2),
      r"b.mask must be an array \[T, N\] or None; got a list of 2",
    ),
    (ANY.Batch(X, Y, "all"), r"b.mask must be an array .*; got 'all'"),
    (sm.Batch(X, Y, Y * 1j), r"b.mask must be bool, integer or float; got an array complex64"),
  ],
)
def test_what_is_no_batch(batch, message):
  with pytest.raises(TypeError, match=message):
    check_batch("b", batch, ("T", "N"))


@pytest.mark.parametrize(
  ("tasks", "message"),
  [
    (GOOD, r"tasks must be a shrinkmeta.Task\(train, val\); got Batch\(.*sm.Task\(train, val\)"),
    ([sm.Task(GOOD, GOOD)], r"tasks must be .* got a list of 1 items. Stack them: sm.stack_tasks"),
    (
      ANY.Task(X, GOOD),
      r"tasks.train must be a shrinkmeta.Batch.*; got an array float32\[2, 4, 3\]",
    ),
    (sm.Task(GOOD, (X, Y)), r"tasks.val must be a shrinkmeta.Batch.*; got a tuple of 2 items"),
  ],
)
def test_what_are_no_tasks(tasks, message):
  with pytest.raises(TypeError, match=message):
    check_tasks(tasks)


def one(n, dtype: Any = np.float32):
  return sm.Batch(np.ones([n, 2], dtype), np.ones([n]))


@pytest.mark.parametrize(
  ("batches", "rows", "error", "message"),
  [
    (GOOD, None, TypeError, r"batches must be a list with one Batch a task; got Batch\(inputs"),
    (one, None, TypeError, r"batches must be a list with one Batch a task; got the function one"),
    ([one(1), None], None, TypeError, r"batches\[1\] must be a shrinkmeta.Batch.*got None"),
    ([one(1)], 2.5, TypeError, r"rows must be an integer; got 2.5"),
    ([one(3)], 2, ValueError, r"rows is 2, but the longest task has 3"),
    ([], None, ValueError, r"no tasks to stack"),
    (
      [one(1), one(1)._replace(inputs=jax.random.split(jax.random.key(0), 1))],
      None,
      TypeError,
      r"batches\[1\]/inputs holds random keys, .*jax.random.key_data",
    ),
    (
      [one(1), one(1, np.int32)],
      None,
      ValueError,
      r"inputs differ in dtype: \['float32', 'int32'\]",
    ),
    (
      [one(1), one(1)._replace(inputs={"x": np.ones(1)})],
      None,
      ValueError,
      r"batches\[1\].inputs .*",
    ),
    (
      [one(1), sm.Batch(np.ones([2, 3], np.float32), np.ones(2))],
      None,
      ValueError,
      "after the axis",
    ),
  ],
)
def test_batches_that_do_not_stack(batches, rows, error, message):
  with pytest.raises(error, match=message):
    sm.stack_batches(batches, rows)


def test_tasks_that_do_not_stack():
  with pytest.raises(TypeError, match=r"tasks\[1\] must be a shrinkmeta.Task.*got Batch"):
    ANY.stack_tasks([sm.Task(one(1), None), one(1)])
  with pytest.raises(TypeError, match=r"tasks must be a list with one Task a task; got Task"):
    ANY.stack_tasks(sm.Task(GOOD, GOOD))
  with pytest.raises(ValueError, match=r"val is None in 1 of 2 tasks"):
    sm.stack_tasks([sm.Task(one(1), None), sm.Task(one(1), one(2))])


@pytest.mark.usefixtures("x64")
def test_stacked_weights_keep_their_digits():
  """0.1 in float32 is another number than in float64."""
  batches = [one(2)._replace(mask=np.array([0.1, 0.2])), one(1)]
  np.testing.assert_array_equal(sm.stack_batches(batches).mask, [[0.1, 0.2], [1.0, 0.0]])
  half = [b._replace(mask=jnp.asarray(b.mask, jnp.bfloat16)) for b in batches[:1]]
  assert weights(sm.stack_batches(half)).dtype == jnp.float32


def test_an_all_masked_single_task():
  with pytest.raises(ValueError, match=r"batch.mask is 0 everywhere"):
    check_batch("batch", sm.Batch(X[0], Y[0], jnp.zeros([4])))


@pytest.mark.parametrize(
  ("tasks", "message"),
  [
    (sm.Task(GOOD, None), r"tasks.val is None.*split the data"),
    (sm.Task(GOOD, jax.tree.map(lambda a: a[:1], GOOD)), r"train has 2 tasks and tasks.val 1"),
    (sm.Task(GOOD, jax.tree.map(lambda a: a[:, :0], GOOD)), r"tasks.val is empty"),
    (sm.Task(sm.Batch(Y[0], Y[0]), GOOD), r"tasks.train/inputs must lead with \[T, N"),
  ],
)
def test_bad_tasks(tasks, message):
  with pytest.raises(ValueError, match=message):
    check_tasks(tasks)


def test_shapes_are_checked_under_jit_too():
  with pytest.raises(ValueError, match="must lead with the same"):
    jax.jit(lambda b: check_batch("b", b))(sm.Batch(X[0], Y[0, :2]))
  jax.jit(lambda b: check_batch("b", b))(sm.Batch(X[0] * jnp.nan, Y[0]))  # values are not known


@pytest.mark.parametrize(
  "mask", (np.array([255, 255, 0], np.uint8), np.array([1.0, -1.0, 1.0]), np.array([2, 1, 0]))
)
def test_masks_that_are_none(mask):
  with pytest.raises(ValueError, match="mask must be 1 for an example and 0 for padding"):
    check_batch("batch", sm.Batch(np.ones(3), np.ones(3), mask))


@pytest.mark.parametrize("mask", (np.array([True, False, True]), np.array([2.5, 0.0, 0.1])))
def test_masks_that_are_bool_or_weights(mask):
  check_batch("batch", sm.Batch(np.ones(3), np.ones(3), mask))
