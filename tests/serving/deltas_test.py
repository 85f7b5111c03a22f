"""Deltas of many tasks are exact, are tied to phi, and are found by id."""

import enum
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.serving.deltas import Deltas, check_fingerprint, deltas, fingerprint

PARAMS = {
  "body": {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.zeros(4)},
  "head": {"w": jnp.linspace(0.5, 2.0, 8).reshape(4, 2), "b": jnp.array([0.25, -3.0])},
}
LIKELIHOOD = sm.gaussian(
  lambda p, x: jnp.tanh(x @ p["body"]["w"] + p["body"]["b"]) @ p["head"]["w"] + p["head"]["b"],
  scale=1.0,
)
LEARNER = sm.anil(LIKELIHOOD, sm.by_layer(PARAMS), head="head")
STATE = LEARNER.init(PARAMS)


def thetas_of(seeds):
  """thetas [T, ...] of tasks that are told apart by a seed each."""
  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  move = lambda p: p + 0.3 * jax.vmap(lambda k: jax.random.normal(k, p.shape))(keys)
  return {"body": {"w": None, "b": None}, "head": jax.tree.map(move, PARAMS["head"])}


def owned(ids, seeds=None):
  return deltas(LEARNER, STATE, thetas_of(range(len(ids)) if seeds is None else seeds), ids)


def equal(a: Deltas, b: Deltas) -> bool:
  assert jax.tree.structure(a.thetas) == jax.tree.structure(b.thetas)
  pairs = zip(jax.tree.leaves(a.thetas), jax.tree.leaves(b.thetas), strict=True)
  return a.ids == b.ids and all(x.dtype == y.dtype and bool((x == y).all()) for x, y in pairs)


def shards(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob("deltas-*.safetensors"))


def test_theta_is_kept_to_the_bit_and_frozen_modules_are_absent():
  x = jax.random.normal(jax.random.key(0), (3, 5, 3))
  thetas, _ = LEARNER.adapt_tasks(STATE, sm.Batch(x, x[..., :2]))
  own = deltas(LEARNER, STATE, thetas, [7, "7", "x/../y"])
  assert own.num_tasks == 3 and own.ids == (7, "7", "x/../y")
  assert own.thetas["body"] == {"w": None, "b": None}
  np.testing.assert_array_equal(own.thetas["head"]["w"], thetas["head"]["w"])
  assert own.labels == LEARNER.labels


def test_index():
  own = owned(["a", "b", 3])
  got = own.index([3, "a", 3])
  assert got.dtype == np.int32 and got.tolist() == [2, 0, 2]
  assert own.index(np.array(["b"])).tolist() == [1]
  with pytest.raises(KeyError, match="'zoe' and 1 more ids.*3 tasks"):
    own.index(["a", "zoe", "yan"])
  with pytest.raises(TypeError, match="ids"):
    own.index("a")
  with pytest.raises(ValueError, match="anonymous"):
    own.anonymous().index(["a"])


def test_ids_of_an_enumeration_are_their_texts():
  class User(str, enum.Enum):  # noqa: UP042 (a StrEnum is printed as its text)
    ANN = "ann"

  own = owned([User.ANN, np.str_("bob")])
  assert own.ids == ("ann", "bob") and [type(task) for task in own.ids] == [str, str]
  assert own.index(["ann", User.ANN]).tolist() == [0, 0]


def test_deltas_are_a_pytree_that_compiles_once_for_equal_ids():
  traced = []

  @jax.jit
  def total(own: Deltas):
    traced.append(own)
    return sum(map(jnp.sum, jax.tree.leaves(own)))

  total(owned(["a", "b"])), total(owned(["a", "b"], [8, 9]))
  assert len(traced) == 1
  total(owned(["a", "c"]))
  assert len(traced) == 2
  total(owned(["a", "b"]).anonymous()), total(owned(["a", "c"]).anonymous())
  assert len(traced) == 3
  assert jax.tree.map(jnp.ones_like, owned(["a", "b"])).ids == ("a", "b")


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"learner": None}, TypeError, "learner"),
    ({"state": PARAMS}, TypeError, "state"),
    ({"ids": ["a"]}, ValueError, r"thetas/head/b must have shape.*\(1, 2\)"),
    ({"ids": ["a", "a"]}, ValueError, "'a' occurs more than once"),
    ({"ids": ["a", True]}, TypeError, "ids must hold strings or integers; got True"),
    ({"ids": []}, ValueError, "ids is empty"),
    ({"ids": "ab"}, TypeError, "ids must be a sequence"),
    ({"ids": {"a", "b"}}, TypeError, "ids must be a sequence.*order is random: pass a list"),
    ({"thetas": {"body": None, "head": None}}, ValueError, "thetas has no arrays"),
    ({"thetas": {"tail": jnp.ones(2)}}, ValueError, "thetas/tail is no parameter"),
    ({"thetas": {"head": {"b": jnp.ones([2, 2])}}}, ValueError, "lacks 'head/w' of the same"),
    ({"thetas": jax.tree.map(lambda x: x * jnp.nan, thetas_of([0, 1]))}, ValueError, "first.*'a'"),
    (
      {"thetas": jax.tree.map(lambda x: x.astype(jnp.bfloat16), thetas_of([0, 1]))},
      ValueError,
      "thetas/head/b is bfloat16",
    ),
  ],
)
def test_errors_name_the_argument(change, error, message):
  given = {"learner": LEARNER, "state": STATE, "thetas": thetas_of([0, 1]), "ids": ["a", "b"]}
  with pytest.raises(error, match=message):
    deltas(**(given | change))


def test_the_fingerprint_sees_every_bit_dtype_and_shape():
  of = lambda x: fingerprint({"w": x})["phi/w"]
  base = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
  flipped = base.copy()
  flipped.view(np.uint32)[1, 1] ^= 1
  others = [flipped, base.T, base.reshape(4), base.view(np.int32), base.astype(jnp.bfloat16)]
  assert len({of(x) for x in [base, *others]}) == 6
  assert {of(np.asfortranarray(base)), of(jnp.asarray(base)), of(base.astype(">f4"))} == {of(base)}
  assert of(jnp.asarray(base)) != of(jnp.asarray(flipped))  # hashes kept in memory do not mix


def test_the_fingerprint_covers_constants():
  class WithConstants(sm.MetaState):
    constants = {"table": jnp.arange(3), "key": jax.random.key(0)}

  prints = fingerprint(WithConstants(*STATE))
  assert prints.keys() - fingerprint(STATE).keys() == {"constants/table", "constants/key"}
  with pytest.raises(ValueError, match="state.constants/key was absent.*1 more"):
    check_fingerprint(fingerprint(STATE), prints, "These Deltas")
