"""Rounded differences: their errors, their bytes, and their cost in nats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.serving.deltas import deltas
from shrinkmeta.serving.files import load_deltas, save_deltas
from shrinkmeta.serving.rounding import rounding_loss
from tests.serving.deltas_test import (
  LEARNER,
  LIKELIHOOD,
  PARAMS,
  STATE,
  equal,
  owned,
  shards,
  thetas_of,
)

pytest.importorskip("safetensors")


@pytest.mark.parametrize(
  ("dtype", "relative", "size"), [("bfloat16", 2**-8, 10 * 2), ("int8", 0.5 / 127, 10 + 2 * 4)]
)
def test_rounded(tmp_path, dtype, relative, size):
  own = owned(range(20))
  save_deltas(tmp_path, own, dtype=dtype, state=STATE)
  back = load_deltas(tmp_path, STATE)
  for path in ("w", "b"):
    want, got, phi = own.thetas["head"][path], back.thetas["head"][path], PARAMS["head"][path]
    largest = jnp.abs(want - phi).reshape(20, -1).max(1)
    error = jnp.abs(want - got).reshape(20, -1).max(1)
    assert got.dtype == jnp.float32 and error.max() > 0
    assert (error <= relative * largest + 1e-6).all()
  (shard,) = shards(tmp_path)
  header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
  assert shard.stat().st_size == header + 20 * (size + 2 * 4)  # a checksum of each leaf


def test_bfloat16_differences_come_back_unchanged(tmp_path):
  """What bfloat16 holds exactly is not rounded a second time."""
  state = LEARNER.init(jax.tree.map(jnp.zeros_like, PARAMS))
  some = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), thetas_of(range(4)))
  own = deltas(LEARNER, state, some, range(4))
  save_deltas(tmp_path, own, dtype="bfloat16", state=state)
  assert equal(load_deltas(tmp_path, state), own)


def test_rounding_loss_is_the_difference_of_means(tmp_path):
  own = owned(range(4))
  x = jax.random.normal(jax.random.key(5), (4, 6, 3))
  batches = sm.Batch(x, x[..., :2], jnp.arange(6) < jnp.array([[6], [3], [1], [4]]))
  loss = rounding_loss(LIKELIHOOD, STATE, own, batches, "int8")
  save_deltas(tmp_path, own, dtype="int8", state=STATE)
  stored = load_deltas(tmp_path, STATE).thetas

  def mean(part, t):
    theta, batch = jax.tree.map(lambda x: x[t], (part, batches))
    return sm.log_likelihood(LIKELIHOOD, sm.merge(theta, STATE.phi), batch) / batch.mask.sum()

  before, after = np.array([[mean(p, t) for t in range(4)] for p in (own.thetas, stored)])
  np.testing.assert_allclose(loss, before - after, atol=4 * np.spacing(np.abs(before)).max())
  assert loss.shape == (4,) and np.abs(loss).max() > 1e-5


def test_tasks_that_stayed_at_phi_come_back_unchanged(tmp_path):
  stay = jax.tree.map(lambda p: jnp.stack([p, p]), STATE.phi["head"])
  own = deltas(LEARNER, STATE, {"body": None, "head": stay}, ["a", "b"])
  save_deltas(tmp_path, own, dtype="int8", state=STATE)
  assert equal(load_deltas(tmp_path, STATE), own)


def test_a_difference_that_overflows_is_refused(tmp_path):
  huge = jax.tree.map(lambda x: jnp.full_like(x, 3.4e38), thetas_of([0]))  # bfloat16: up to 3.39e38
  with pytest.raises(ValueError, match="theta - phi of 'head/b' overflows.*dtype=None"):
    save_deltas(tmp_path, deltas(LEARNER, STATE, huge, ["a"]), dtype="bfloat16", state=STATE)
  # The save that failed does not tie the folder to its phi.
  other = STATE._replace(phi=jax.tree.map(lambda p: p + 1, STATE.phi))
  own = deltas(LEARNER, other, thetas_of([0]), ["b"])
  save_deltas(tmp_path, own)
  assert equal(load_deltas(tmp_path, other), own)


@pytest.mark.parametrize("dtype, rounding", ((jnp.float16, "bfloat16"), (jnp.float32, "int8")))
def test_a_theta_that_rounds_to_infinity_is_refused(tmp_path, dtype, rounding):
  learner = sm.maml(sm.gaussian(lambda p, x: x * p["w"]), {"w": "w"})
  state = learner.init({"w": jnp.zeros((), dtype)})
  own = deltas(learner, state, {"w": jnp.full(1, jnp.finfo(dtype).max, dtype)}, ["a"])
  with pytest.raises(ValueError, match="overflows.*dtype=None"):
    save_deltas(tmp_path, own, dtype=rounding, state=state)


def test_double_precision(tmp_path, x64):
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)
  learner = sm.anil(LIKELIHOOD, sm.by_layer(params), head="head")
  state = learner.init(params)
  moved = jax.tree.map(lambda p: jnp.stack([p + 1 / 3, p - 1e-12]), params["head"])
  own = deltas(learner, state, {"body": None, "head": moved}, [1, 2])
  save_deltas(tmp_path / "exact", own)
  assert equal(load_deltas(tmp_path / "exact", state), own)
  save_deltas(tmp_path / "int8", own, dtype="int8", state=state)
  back = load_deltas(tmp_path / "int8", state)
  # All entries of this leaf are its largest, which int8 keeps: 127 / 127. What is left is the
  # rounding of p - 1e-12 in float64, up to 1.1e-4 of the difference, on the way in and out.
  np.testing.assert_allclose(back.thetas["head"]["w"][1] - params["head"]["w"], -1e-12, rtol=5e-4)


def test_the_cost_of_rounding_with_constants():
  likelihood = sm.gaussian(lambda p, x, constants: x * p["w"] * constants["unit"])
  learner = sm.maml(likelihood, {"w": "w"})
  state = learner.init({"w": 0.0}, constants={"unit": jnp.array(2.0)})
  own = deltas(learner, state, {"w": jnp.array([1.0, 1.01])}, ["ann", "bob"])
  loss = rounding_loss(likelihood, state, own, sm.Batch(jnp.ones([2, 4]), jnp.ones([2, 4])), "int8")
  np.testing.assert_allclose(loss, 0.0, atol=1e-5)  # one number of a leaf is exact in int8
  half = rounding_loss(
    likelihood, state, own, sm.Batch(jnp.ones([2, 4]), jnp.ones([2, 4])), "bfloat16"
  )
  near = float(jnp.asarray(1.01, jnp.bfloat16))
  np.testing.assert_allclose(half, [0.0, 0.5 * ((2 * near - 1) ** 2 - 1.02**2)], atol=1e-6)
