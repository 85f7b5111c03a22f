import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown


def test_known():
  np.testing.assert_array_equal(validate.known(jnp.ones([2])), [1.0, 1.0])
  assert validate.known(3.0) == 3.0
  assert validate.known(jax.random.key(0)) is None
  seen = []
  jax.jit(lambda x: seen.append(validate.known(x)))(jnp.ones([2]))
  assert seen == [None]


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({}, r"phi has no arrays"),
    ({"a": jnp.ones([2]), "n": {"c": jnp.ones([2], int)}}, r"phi/n/c has dtype int32.*constants="),
    ({"a": True}, r"phi/a has dtype bool"),
    ({"a": jnp.ones([2], complex)}, r"phi/a has dtype complex64"),
    (
      {"a": jnp.ones([2]), "b": jnp.ones([2], jnp.bfloat16)},
      r"phi mixes dtypes: phi/a is float32, phi/b is bfloat16. Cast",
    ),
    ({"a": jnp.ones([2]), "b": jnp.array([0.0, jnp.inf])}, r"phi/b .*index \(1,\): inf"),
    ({"a": jnp.array(jnp.nan, jnp.bfloat16)}, r"phi/a \(shape \(\)\).*index \(\): nan"),
  ],
)
def test_bad_parameters(tree, message):
  with pytest.raises(ValueError, match=message):
    validate.parameters("phi", tree)


def test_good_parameters():
  assert validate.parameters("phi", {"a": jnp.ones([2], jnp.bfloat16)}) == jnp.bfloat16
  assert validate.parameters("phi", [np.ones([2], np.float32), jnp.zeros([])]) == jnp.float32


def test_bad_parameters_under_jit():
  with pytest.raises(ValueError, match="phi/a has dtype int32"):
    jax.jit(lambda t: validate.parameters("phi", t))({"a": jnp.ones([2], int)})


def test_a_complex_number_is_finite_in_both_parts():
  validate.finite("x", jnp.array([1.0 + 1.0j]))
  for bad in (complex(1.0, np.nan), complex(np.inf, 0.0)):
    with pytest.raises(ValueError, match="x .* has 1 NaN or infinite entries"):
      validate.finite("x", np.array([1.0, bad]))


def test_same_shapes_looks_at_every_axis():
  phi = {"a": jnp.ones([2, 3])}
  validate.same_shapes("thetas", {"a": jnp.ones([5, 2, 3])}, "phi", phi, lead=1)
  for shape in ((5, 2), (2, 3), (5, 3, 2), (5, 5, 2, 3)):
    with pytest.raises(ValueError, match=r"thetas/a has shape .*phi/a has \(2, 3\).*axis T"):
      validate.same_shapes("thetas", {"a": jnp.ones(shape)}, "phi", phi, lead=1)


class Net(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.body = nnx.Linear(2, 3, rngs=rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)


class Module:
  """The base class of equinox, by its name alone."""

  __module__ = "equinox._module"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Mlp(Module):
  weight: jax.Array | None
  activation: Callable | None


DENSE = nn.Dense(3)
VARIABLES = DENSE.init(jax.random.key(0), jnp.ones([1, 2]))


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    (
      Net(),
      r"params must be a pytree of arrays; got an nnx module, Net.*nnx.split\(model, nnx.Par",
    ),
    ({"net": Net()}, r"params/net must be .* an nnx module, Net"),
    (
      nnx.state(Net()),
      r"params/drop/rngs/count is an nnx.RngCount, not a parameter.*constants=rest",
    ),
    (nnx.state(Net().norm), r"params/mean is an nnx.BatchStat, not a parameter"),
    (Mlp(jnp.ones(2), jax.nn.relu), r"params must be .* an equinox module, Mlp.*eqx.is_inexact_a"),
    (DENSE, r"params must be a pytree of arrays.* flax.linen module.*module.init\(key, inputs"),
    ({**VARIABLES, "batch_stats": {}}, r"\['batch_stats'\].*pass variables\[\"params\"\]"),
    ("head", r"params must be a pytree of arrays, the parameters; got 'head'.*not their labels"),
    ({"a": "head"}, r"params/a must be an array; got 'head'"),
    (None, r"params must be a pytree of arrays, the parameters; got None"),
    ([[1.0, 2.0], [3.0, 4.0]], r"params must be an array; got a list of lists.*jnp.asarray"),
    ({"w": [[1.0], [3.0]]}, r"params/w must be an array; got a list of lists"),
    ([jnp.ones(2), jax.nn.relu], r"params/1 must be an array.*Keep functions out"),
    (DENSE.init, r"params must be a pytree of arrays.*got the function init"),
    ({"a": np.array(["x"])}, r"params/a must be an array; got an array <U1\[1\]"),
    ({"a": object()}, r"params/a must be an array; got an object of type builtins.object"),
  ],
)
def test_what_is_no_parameter_pytree(tree, message):
  with pytest.raises(TypeError, match=message):
    validate.parameters("params", tree)


@pytest.mark.parametrize(
  "tree",
  [
    nnx.state(Net(), nnx.Param),
    nnx.state(Net().norm, nnx.Param),
    VARIABLES,
    VARIABLES["params"],
    Mlp(jnp.ones(2), None),
    {"a": None, "b": 0.0},
    [[jnp.ones(2), 0.0], [jnp.ones(2), 0.0]],
    jnp.ones([2]),
  ],
)
def test_what_is_a_parameter_pytree(tree):
  assert validate.parameters("params", tree) == jnp.float32


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (VARIABLES, r"labels/params/bias must be a string, .*; got an array float32\[3\].*by_layer"),
    (len, r"labels must be a string, .*; got the function len"),
    (None, r"labels must be a pytree of strings; got None"),
    ({"a": 3}, r"labels/a must be a string.*got 3"),
  ],
)
def test_what_are_no_labels(labels, message):
  with pytest.raises(TypeError, match=message):
    validate.labels("labels", labels)


def test_an_instance_of_another_type():
  hint = "Wrap it: sm.Inner(optax.sgd(0.1), steps=5)."
  with pytest.raises(
    TypeError, match=r"inner must be a sm.Inner; got Gr.*\(init=..., update=.*5\)"
  ):
    validate.instance("inner", optax.sgd(0.1), dict, "a sm.Inner", hint)
  with pytest.raises(TypeError, match=r"x must be an array \[N\]; got a list of 2 items. Make"):
    validate.array("x", [1, 2], "an array [N]")
  for model in (Net(), DENSE, Mlp(jnp.ones(2), None)):
    with pytest.raises(TypeError, match=r"predict must be a function, .*got an? .* module"):
      validate.function("predict", model, "(theta, inputs) -> outputs")
  for value in (2.0, True, jnp.ones(2, jnp.int32)):
    with pytest.raises(TypeError, match=r"steps must be an integer; got (2.0|True|an array)"):
      validate.integer("steps", value)
  with pytest.raises(ValueError, match=r"steps must be at least 1; got 0"):
    validate.integer("steps", 0, least=1)
  assert validate.integer("steps", np.int64(3)) == validate.integer("steps", jnp.int32(3)) == 3
  validate.instance("x", 3, int, "an integer")
  validate.function("f", len, "x -> its length")
  validate.array("x", np.float32(2), "a number")
  validate.array("x", jnp.ones(2, jnp.bfloat16), "an array [N]")


@pytest.mark.parametrize(
  "value",
  ["a" * 500, {str(i): i for i in range(500)}, [jnp.ones(500)] * 500, Net(), DENSE, 10**200, Mlp],
)
def test_what_came_is_told_in_few_words(value):
  assert len(shown(value)) < 100
