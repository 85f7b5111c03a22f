"""The model, the adapters and the data that both libraries use, read from one folder."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shrinkmeta as sm
from experiments.networks import llama

PyTree = Any
_RULES = r"layers/(q_proj|v_proj)"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a comparison; the defaults are a Llama of 26 M parameters."""

  vocabulary: int = 7_000
  width: int = 512
  hidden: int = 1_376
  layers: int = 6
  heads: int = 8
  rank: int = 8
  tasks: int = 64
  tokens: int = 32  # of a row
  examples: int = 1  # rows that each task adapts on
  steps: int = 5  # of SGD
  rate: float = 1.0


class Problem:
  """One base, a row of tokens and adapters for every task, and data to adapt on."""

  def __init__(self, sizes: Sizes, seed: int = 0):
    """Draw everything from a seed."""
    keys = jax.random.split(jax.random.key(seed), 5)
    self.sizes = sizes
    self.config = llama.config_of(document(sizes))
    self.base = llama.init(keys[0], self.config)
    # PEFT's start: A is random, and B is 0.
    self.start = sm.lora.init(keys[1], self.base, {_RULES: sizes.rank})
    leaves, structure = jax.tree.flatten(self.start)
    draws = jax.random.split(keys[2], len(leaves))
    normal = lambda key, leaf: 0.1 * jax.random.normal(key, (sizes.tasks, *leaf.shape))
    self.adapters = jax.tree.unflatten(structure, list(map(normal, draws, leaves)))
    draw = lambda key, *shape: jax.random.randint(key, shape, 0, sizes.vocabulary)
    self.rows = draw(keys[3], sizes.tasks, sizes.tokens)
    self.data = draw(keys[4], sizes.tasks, sizes.examples, sizes.tokens + 1)

  def write(self, folder: pathlib.Path) -> None:
    """Write the base, the adapters and the data for a process that runs PEFT."""
    folder.mkdir()
    base, alpha = str(folder / "base"), float(self.sizes.rank)
    names = llama.names(self.config)
    sm.export.merged(base, self.base, self.start, names, alpha, document(self.sizes))
    modules = {path: name for path, name in llama.modules().items() if path in self.kernels}
    for task in range(self.sizes.tasks):
      own = jax.tree.map(lambda x, task=task: x[task], self.adapters)
      sm.export.peft(folder / f"task{task}", own, modules, alpha, base)
    sm.export.peft(folder / "start", self.start, modules, alpha, base)
    np.save(folder / "rows.npy", np.asarray(self.rows))
    np.save(folder / "data.npy", np.asarray(self.data))
    about = dataclasses.asdict(self.sizes)
    (folder / "sizes.json").write_text(json.dumps(about), encoding="utf-8")

  @property
  def kernels(self) -> list[str]:
    """The paths of the kernels that have adapters."""
    return [f"layers/{name}" for name in self.start["layers"]]


def document(sizes: Sizes) -> dict[str, Any]:
  """Return the config.json of the model, as transformers writes it."""
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": sizes.vocabulary,
    "hidden_size": sizes.width,
    "intermediate_size": sizes.hidden,
    "num_hidden_layers": sizes.layers,
    "num_attention_heads": sizes.heads,
    "num_key_value_heads": sizes.heads,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
  }


def log_prob(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Return the mean log-probability of the tokens of each row, [N]."""
  each = jax.nn.log_softmax(outputs)  # [N, S, vocabulary]
  return jnp.take_along_axis(each, targets[..., None], -1)[..., 0].mean(-1)
