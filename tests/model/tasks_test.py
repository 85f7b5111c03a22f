import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.model.tasks import check_batch, check_tasks, num_examples, weights

X = jnp.ones([2, 4, 3])
Y = jnp.ones([2, 4])
GOOD = sm.Batch(X, Y)


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
    ((X, Y), r"b must be a shrinkmeta.Batch\(inputs, targets, mask\); got <class 'tuple'>"),
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


def test_an_all_masked_single_task():
  with pytest.raises(ValueError, match=r"batch.mask is 0 everywhere"):
    check_batch("batch", sm.Batch(X[0], Y[0], jnp.zeros([4])))


@pytest.mark.parametrize(
  ("tasks", "message"),
  [
    (GOOD, r"tasks must be a shrinkmeta.Task\(train, val\); got .*Batch"),
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
