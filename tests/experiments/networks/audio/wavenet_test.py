"""The WaveNet: against a plain NumPy loop, what an output depends on, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks.audio import wavenet

CONFIG = wavenet.Config(dilations=(1, 3, 4), channels=3, skip=5, hidden=4)
FIELD = wavenet.receptive_field(CONFIG)
PARAMS = wavenet.init(jax.random.key(0), CONFIG)
# Larger kernels than at the start, so that every input matters.
PARAMS = jax.tree.map(lambda x: 1.5 * x + 0.1, PARAMS)
APPLY = jax.jit(lambda params, levels: wavenet.apply(CONFIG, params, levels))
LEVELS = np.random.default_rng(1).integers(0, 256, (2, FIELD + 5))


def output(params, levels):
  """The logits after the last of a list of levels, by the formulas, in float64."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  dense = lambda p, x: x @ p["kernel"] + p["bias"]
  channels = len(params["embed"]["table"][0])
  skips = 0.0

  def layer_input(i, t):
    """The input of layer i at time t; i = number of layers is the end, whose skips count."""
    if i == 0:
      return params["embed"]["table"][levels[t]]
    return layer_input(i - 1, t) + mixed(i - 1, t)[:channels]

  def mixed(i, t):
    layer, d = params[f"layer_{i}"], CONFIG.dilations[i]
    both = np.concatenate([layer_input(i, t - d), layer_input(i, t)])
    gates = dense(layer["gate"], both)
    a = np.tanh(gates[:channels]) / (1 + np.exp(-gates[channels:]))
    return dense(layer["mix"], a)

  for i in range(len(CONFIG.dilations)):
    skips = skips + mixed(i, len(levels) - 1)[channels:]
  hidden = dense(params["head_0"], np.maximum(skips, 0.0))
  return dense(params["head_1"], np.maximum(hidden, 0.0))


def test_logits_are_those_of_a_plain_loop():
  found = np.asarray(APPLY(PARAMS, LEVELS))
  assert found.shape == (2, 6, 256)
  for n in range(2):
    for s in range(6):
      # The loop indexes from the end, so more than R samples give the same.
      want = output(PARAMS, list(LEVELS[n, : FIELD + s]))
      np.testing.assert_allclose(found[n, s], want, rtol=1e-4, atol=1e-5)


def test_an_output_depends_on_its_receptive_field_only():
  assert FIELD == 1 + 1 + 3 + 4
  before = np.asarray(APPLY(PARAMS, LEVELS))
  for place in range(LEVELS.shape[1]):
    changed = LEVELS.copy()
    changed[:, place] = (changed[:, place] + 100) % 256
    differs = np.any(np.asarray(APPLY(PARAMS, changed)) != before, (0, 2))
    # Output s sees the samples s to s + R - 1: none after it. It hears sums of some dilations.
    ages = [s + FIELD - 1 - place for s in range(6)]
    heard = {0, 1, 3, 4, 5, 7, 8}  # 0, 1, 3, 4 and their sums; 2 and 6 are in no sum
    assert differs.tolist() == [age in heard for age in ages], place


def test_samples_agree_with_the_network_on_the_same_prefix():
  count, prefix = 12, jnp.asarray(LEVELS[0])
  draw = jax.jit(lambda key: wavenet.sample(CONFIG, PARAMS, key, prefix, count))
  levels, log_probs = map(np.asarray, draw(jax.random.key(3)))
  heard = np.concatenate([LEVELS[0], levels])[None, -(count + FIELD) : -1]
  logits = np.asarray(wavenet.apply(CONFIG, PARAMS, jnp.asarray(heard)))[0].astype(np.float64)
  own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  np.testing.assert_allclose(log_probs, own[np.arange(count), levels], atol=1e-4)
  again, _ = draw(jax.random.key(3))
  other, _ = draw(jax.random.key(4))
  assert (np.asarray(again) == levels).all() and (np.asarray(other) != levels).any()


def test_too_few_samples():
  with pytest.raises(ValueError, match=f"at least {FIELD} samples.*got {FIELD - 1}"):
    wavenet.apply(CONFIG, PARAMS, jnp.zeros((1, FIELD - 1), jnp.int32))
  with pytest.raises(ValueError, match=f"at least {FIELD} samples.*got 2"):
    wavenet.sample(CONFIG, PARAMS, jax.random.key(0), jnp.zeros(2, jnp.int32), 1)
