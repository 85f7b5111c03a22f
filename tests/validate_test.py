import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shrinkmeta import validate


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
    ({"a": jnp.ones([2]), "n": {"c": jnp.ones([2], int)}}, r"phi/n/c has dtype int32.*close over"),
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


def test_same_shapes_looks_at_every_axis():
  phi = {"a": jnp.ones([2, 3])}
  validate.same_shapes("thetas", {"a": jnp.ones([5, 2, 3])}, "phi", phi, lead=1)
  for shape in ((5, 2), (2, 3), (5, 3, 2), (5, 5, 2, 3)):
    with pytest.raises(ValueError, match=r"thetas/a has shape .*phi/a has \(2, 3\).*axis T"):
      validate.same_shapes("thetas", {"a": jnp.ones(shape)}, "phi", phi, lead=1)
