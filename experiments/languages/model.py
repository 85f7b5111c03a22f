"""The network, its likelihood, and the training of the base on pooled languages."""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shrinkmeta as sm
from experiments.datasets.text import windows
from experiments.datasets.text.declarations import Version
from experiments.networks import llama
from experiments.runs import training
from experiments.settings.schema import Config

PyTree = Any


def network(config: Config) -> llama.Config:
  """Return the sizes of the Llama network, whose head is not tied to the embedding."""
  own = config.network
  return llama.Config(
    vocab_size=windows.VOCABULARY,
    hidden_size=own.width,
    intermediate_size=own.hidden,
    num_hidden_layers=own.layers,
    num_attention_heads=own.heads,
    num_key_value_heads=own.heads,
    head_dim=own.width // own.heads,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
  )


def document(config: Config) -> dict[str, Any]:
  """Return the network's config.json for transformers, which `llama.read` reads too."""
  own = network(config)
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": own.vocab_size,
    "hidden_size": own.hidden_size,
    "intermediate_size": own.intermediate_size,
    "num_hidden_layers": own.num_hidden_layers,
    "num_attention_heads": own.num_attention_heads,
    "num_key_value_heads": own.num_key_value_heads,
    "head_dim": own.head_dim,
    "rms_norm_eps": own.rms_norm_eps,
    "rope_theta": own.rope_theta,
    "max_position_embeddings": config.context,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
  }


def predict(config: Config) -> Callable[[PyTree, jax.Array], jax.Array]:
  """Return (params, bytes [N, S]) -> logits [N, S, 256] of the byte after each position."""
  own = network(config)
  return lambda params, inputs: llama.apply(own, params, inputs.astype(jnp.int32))


def likelihood(predict: Callable[..., jax.Array]) -> sm.Likelihood:
  """Return the likelihood of windows: the log density of a window is a sum over its bytes, in nats.

  Args:
    predict: (theta, inputs [N, S]) -> logits [N, S, 256], with constants as an optional argument.

  Returns:
    A Likelihood with targets [N, S]: bytes, or PADDING at positions that do not count.
  """
  of_bytes = sm.categorical(predict).log_prob

  def log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    n, s, classes = logits.shape
    counts = targets != windows.PADDING
    labels = jnp.where(counts, targets, 0).reshape(-1)
    each = of_bytes(logits.reshape(-1, classes), labels).reshape(n, s)
    return jnp.sum(jnp.where(counts, each, 0.0), -1)

  return sm.Likelihood(predict, log_prob)


def train_base(
  config: Config, versions: Sequence[Version], seed: int, folder: pathlib.Path
) -> tuple[PyTree, list[float]]:
  """Train the network on the windows of all versions; continue from a checkpoint in `folder`.

  Returns:
    (parameters, the losses of all steps in bits per byte).
  """
  # arms.py draws with the numbers 1 and 2, stages.py with 3.
  key = jax.random.fold_in(jax.random.key(seed), 0)
  own, texts = config.base, [windows.windows(v.articles, config.context) for v in versions]
  join = lambda parts: np.concatenate([np.asarray(part) for part in parts])
  pool = sm.Batch(join([b.inputs for b in texts]), join([b.targets for b in texts]))
  params, losses = training.train_base(
    likelihood(predict(config)),
    llama.init(key, network(config), scale=0.3 / math.sqrt(config.network.width)),
    pool,
    lambda rate: optax.chain(optax.clip_by_global_norm(config.context / 4), optax.adamw(rate)),
    folder,
    steps=own.steps,
    rate=own.rate,
    rows=own.windows,
    seed=seed,
    save_every=100,
  )
  of_window = windows.num_targets(pool) / len(pool.inputs)  # the last one of a text is padded
  return params, windows.bits_per_byte(losses, of_window).tolist()


def texts(
  config: Config, versions: Sequence[Version], articles: int, most: int | None = None
) -> list[sm.Batch]:
  """Return the windows of the first articles of every version."""
  return [windows.windows(v.articles[:articles], config.context, most) for v in versions]


def judged(config: Config, versions: Sequence[Version], most: int | None = None) -> list[sm.Batch]:
  """Return the windows of the last ten articles of every version."""
  return [windows.windows(v.articles[-10:], config.context, most) for v in versions]
