"""A small WaveNet: a causal network over raw audio, with a distribution of the next sample.

An embedding of the current sample enters L layers of dilated convolutions with two taps. With
dilation d, layer i computes

    [f; g] = W_i [x_{t-d}; x_t] + b_i        a_t = tanh(f) * sigmoid(g)
    [r; s] = V_i a_t + c_i                   x_t <- x_t + r,   skip_t <- skip_t + s

and two dense layers with ReLUs before them turn the sum of the skips into logits. The output at t
depends on the `receptive_field` last samples up to t. Convolutions are not padded, so all outputs
have a whole receptive field of real samples.

Letters in shapes: R samples of the receptive field, S samples with an output, C channels.

References: van den Oord et al., WaveNet: A generative model for raw audio, arXiv 1609.03499.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]
LEVELS = 256  # of a sample with 8 bits


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of a network: dilations of the layers, channels, channels of skips and head."""

  dilations: tuple[int, ...]
  channels: int
  skip: int
  hidden: int


def receptive_field(config: Config) -> int:
  """Return R = 1 + the sum of the dilations, the number of samples that an output depends on."""
  return 1 + sum(config.dilations)


def layers(config: Config) -> tuple[str, ...]:
  """Return the names of the layers, which are the keys of the parameters, from input to output."""
  gated = (f"layer_{i}" for i in range(len(config.dilations)))
  return ("embed", *gated, "head_0", "head_1")


def init(key: jax.Array, config: Config) -> Params:
  """Draw parameters. Kernels have standard deviation 1 / sqrt(inputs), and biases are 0.

  The embedding begins as a line through the levels plus a little noise, so that neighbouring levels
  begin alike. The logits begin small.
  """
  channels, skip = config.channels, config.skip
  keys = iter(jax.random.split(key, 4 + 2 * len(config.dilations)))

  def dense(inputs: int, outputs: int, scale: float = 1.0) -> Params:
    kernel = jax.random.normal(next(keys), (inputs, outputs)) * scale / math.sqrt(inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}

  line = jnp.linspace(-1.0, 1.0, LEVELS)[:, None] * jax.random.normal(next(keys), (channels,))
  params: Params = {
    "embed": {"table": line + 0.02 * jax.random.normal(next(keys), (LEVELS, channels))}
  }
  for i in range(len(config.dilations)):
    params[f"layer_{i}"] = {
      "gate": dense(2 * channels, 2 * channels),
      "mix": dense(channels, channels + skip, 0.5),
    }
  params["head_0"] = dense(skip, config.hidden)
  params["head_1"] = dense(config.hidden, LEVELS, 0.1)
  return params


def apply(config: Config, params: Params, levels: jax.Array) -> jax.Array:
  """Return logits [N, S, 256] of the sample after each of the last S samples.

  Args:
    config: the sizes.
    params: the parameters.
    levels: [N, R - 1 + S] mu-law levels, of any integer dtype.

  Raises:
    ValueError: there are fewer than R samples.
  """
  outputs = levels.shape[-1] - receptive_field(config) + 1
  if outputs < 1:
    raise ValueError(
      f"This network wants at least {receptive_field(config)} samples, its receptive field; got "
      f"{levels.shape[-1]}. Pass more samples, or take smaller dilations."
    )
  x, skips = params["embed"]["table"][levels], jnp.zeros([])
  for i, dilation in enumerate(config.dilations):
    layer, now = params[f"layer_{i}"], x[..., dilation:, :]
    update, skip = _layer(layer, x[..., :-dilation, :], now)
    x = now + update
    skips = skips + skip[..., -outputs:, :]
  return _head(params, skips)


def _layer(layer: Params, before: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (r, s) of the formula at the head of this file."""
  filtered, gate = jnp.split(_dense(layer["gate"], jnp.concatenate([before, now], -1)), 2, -1)
  mixed = _dense(layer["mix"], jnp.tanh(filtered) * jax.nn.sigmoid(gate))
  return mixed[..., : now.shape[-1]], mixed[..., now.shape[-1] :]


def _head(params: Params, skips: jax.Array) -> jax.Array:
  hidden = _dense(params["head_0"], jax.nn.relu(skips))
  return _dense(params["head_1"], jax.nn.relu(hidden))


def _dense(params: Params, x: jax.Array) -> jax.Array:
  return x @ params["kernel"] + params["bias"]


def sample(
  config: Config, params: Params, key: jax.Array, prefix: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  """Draw samples one after another, each from its distribution given all before it.

  Each layer keeps the last d inputs, d its dilation, so a sample costs one column of the network.

  Args:
    config: the sizes.
    params: the parameters.
    key: a random key, which is consumed.
    prefix: [P] levels that are heard first, P >= R.
    count: S, the number of samples to draw.

  Returns:
    (levels [S] int32, their log probabilities [S] in nats).

  Raises:
    ValueError: the prefix is shorter than R.
  """
  if prefix.shape[0] < receptive_field(config):
    raise ValueError(
      f"The prefix has at least {receptive_field(config)} samples, the receptive field; got "
      f"{prefix.shape[0]}. Pass more samples, such as silence."
    )
  start = tuple(jnp.zeros((d, config.channels)) for d in config.dilations)

  def column(past: tuple[jax.Array, ...], level: jax.Array) -> tuple[Any, jax.Array]:
    """One column of the network: (the inputs that layers keep, logits of the next sample)."""
    x, skips, kept = params["embed"]["table"][level], jnp.zeros([]), []
    for i, memory in enumerate(past):
      update, skip = _layer(params[f"layer_{i}"], memory[0], x)
      kept.append(jnp.concatenate([memory[1:], x[None]]))
      x, skips = x + update, skips + skip
    return tuple(kept), _head(params, skips)

  def draw(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    past, logits = carry
    level = jax.random.categorical(key, logits)
    return column(past, level), (level, jax.nn.log_softmax(logits)[level])

  past, logits = jax.lax.scan(column, start, prefix)
  return jax.lax.scan(draw, (past, logits[-1]), jax.random.split(key, count))[1]
