"""A Llama network that reads the weights of transformers' Llama models.

A layer is [RMS norm, causal attention with rotary positions and grouped key-value heads], then [RMS
norm, SwiGLU]. An RMS norm and a linear head follow the last layer. The kernels of all layers are
stacked, [layers, in, out], and `jax.lax.scan` runs over them. So the compiled program does not grow
with the number of layers. Sequences have no padding on the left.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """How Llama 3 slows down rotary frequencies for long texts; names are those of config.json."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes of a network; names are those of config.json."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rms_norm_eps: float
  rope_theta: float
  tie_word_embeddings: bool = False
  rope: Llama3Rope | None = None


def config_of(document: Mapping[str, Any]) -> Config:
  """Return the configuration that a config.json of transformers describes.

  Raises:
    ValueError: the model has a part that this network lacks. The message names it.
  """
  wanted = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
  for key, value in wanted.items():
    if (found := document.get(key, value)) != value:
      raise ValueError(f"config.json: {key} must be {value!r} for this network; got {found!r}.")
  # transformers 5 keeps one dict, earlier releases rope_theta and rope_scaling.
  rope = dict(document.get("rope_parameters") or document.get("rope_scaling") or {})
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise ValueError(f"config.json: rope_type must be 'default' or 'llama3'; got {kind!r}.")
  heads = document["num_attention_heads"]
  fields = [field.name for field in dataclasses.fields(Llama3Rope)]
  return Config(
    vocab_size=document["vocab_size"],
    hidden_size=document["hidden_size"],
    intermediate_size=document["intermediate_size"],
    num_hidden_layers=document["num_hidden_layers"],
    num_attention_heads=heads,
    num_key_value_heads=document.get("num_key_value_heads") or heads,
    head_dim=document.get("head_dim") or document["hidden_size"] // heads,
    rms_norm_eps=document["rms_norm_eps"],
    rope_theta=rope.get("rope_theta", document.get("rope_theta", 10000.0)),
    tie_word_embeddings=document.get("tie_word_embeddings", False),
    rope=Llama3Rope(**{name: rope[name] for name in fields}) if kind == "llama3" else None,
  )


def names(config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Return {path of our parameter: (name of transformers' tensor, permutation of its axes)}.

  This is an argument of `shrinkmeta.adapters.export.merged`. "{i}" stands for the number of a
  layer.
  """
  layer = {f"layers/{n}": (f"model.layers.{{i}}.{n}.weight", (0,)) for n in _NORMS}
  kernels = {path: (f"{name}.weight", (1, 0)) for path, name in modules().items()}
  found = {"embed": ("model.embed_tokens.weight", (0, 1)), "norm": ("model.norm.weight", (0,))}
  found |= layer | kernels
  return found if config.tie_word_embeddings else found | {"head": ("lm_head.weight", (1, 0))}


def modules() -> dict[str, str]:
  """Return {path of a stacked kernel: PEFT's module}, for `shrinkmeta.adapters.export.peft`."""
  of = {name: "self_attn" for name in _ATTENTION} | {name: "mlp" for name in _MLP}
  return {f"layers/{name}": f"model.layers.{{i}}.{part}.{name}" for name, part in of.items()}


def shapes(config: Config) -> Params:
  """Return the shape of every parameter: kernels are [in, out], or [layers, in, out] in layers."""
  width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
  queries = config.num_attention_heads * config.head_dim
  keys = config.num_key_value_heads * config.head_dim
  kernels = {
    "q_proj": (width, queries),
    "k_proj": (width, keys),
    "v_proj": (width, keys),
    "o_proj": (queries, width),
    "gate_proj": (width, hidden),
    "up_proj": (width, hidden),
    "down_proj": (hidden, width),
  }
  kernels |= {name: (width,) for name in _NORMS}
  found: Params = {"embed": (config.vocab_size, width), "norm": (width,)}
  found["layers"] = {name: (layers, *shape) for name, shape in kernels.items()}
  return found if config.tie_word_embeddings else found | {"head": (width, config.vocab_size)}


def init(key: jax.Array, config: Config, scale: float = 0.02) -> Params:
  """Draw random parameters: kernels are normal with this standard deviation, norms are 1."""
  leaves, structure = jax.tree.flatten(shapes(config), is_leaf=lambda x: isinstance(x, tuple))
  keys = jax.random.split(key, len(leaves))
  draws = [scale * jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
  params = jax.tree.unflatten(structure, draws)
  one = lambda path, x: jnp.ones_like(x) if "norm" in jax.tree_util.keystr(path) else x
  return jax.tree_util.tree_map_with_path(one, params)


def read(folder: str | os.PathLike[str]) -> tuple[Config, Params]:
  """Read config.json and model.safetensors of a Llama model that transformers saved.

  Returns:
    (config, params), in the dtype of the file.

  Raises:
    ImportError: safetensors is not installed.
    ValueError: the model has parts that this network lacks, or tensors are missing.
  """
  # An optional dependency, which only this function needs.
  from safetensors import flax as safetensors  # pyright: ignore[reportMissingImports]

  folder = pathlib.Path(folder)
  config = config_of(json.loads((folder / "config.json").read_text(encoding="utf-8-sig")))
  tensors = safetensors.load_file(folder / "model.safetensors")
  tensors.pop("lm_head.weight" if config.tie_word_embeddings else "", None)
  params: Params = {"layers": {}}
  for path, (name, permutation) in names(config).items():
    layers = range(config.num_hidden_layers if "{i}" in name else 1)
    wanted = [name.replace("{i}", str(i)) for i in layers]
    if missing := [one for one in wanted if one not in tensors]:
      raise ValueError(f"model.safetensors lacks {missing[0]!r}; it has {sorted(tensors)}.")
    arrays = [jnp.transpose(tensors.pop(one), permutation) for one in wanted]
    node = params["layers"] if "{i}" in name else params
    node[path.split("/")[-1]] = jnp.stack(arrays) if "{i}" in name else arrays[0]
  if tensors:
    raise ValueError(f"model.safetensors has tensors that this network lacks: {sorted(tensors)}.")
  found = jax.tree.map(jnp.shape, params)
  if found != shapes(config):
    raise ValueError(f"model.safetensors has shapes {found}; config.json wants {shapes(config)}.")
  return config, params


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Return scale x / sqrt(mean x^2 + epsilon) over the last axis, in float32 or wider."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + epsilon)
  return scale * wide.astype(x.dtype)


def frequencies(config: Config) -> jax.Array:
  """Return [head_dim / 2] angles in radians for each position, theta^(-2 k / head_dim).

  Llama 3 divides the slow angles by `factor`, and interpolates between slow and fast ones.
  """
  plain = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2) / config.head_dim)
  if config.rope is None:
    return plain
  turns = config.rope.original_max_position_embeddings * plain / (2 * math.pi)
  low, high = config.rope.low_freq_factor, config.rope.high_freq_factor
  fast = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return plain * (fast + (1.0 - fast) / config.rope.factor)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Turn the pairs (x_k, x_{k + head_dim / 2}) of x [N, S, heads, head_dim] by angles [S, .]."""
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  first, second = jnp.split(x, 2, -1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
  return turned.astype(x.dtype)


def attention(config: Config, layer: Params, x: jax.Array, angles: jax.Array) -> jax.Array:
  """Return causal attention, [N, S, width]; groups of query heads share keys and values."""
  n, s, _ = x.shape
  shared, size = config.num_key_value_heads, config.head_dim
  split = lambda name: (x @ layer[name]).reshape(n, s, -1, size)
  q, k, v = rotate(split("q_proj"), angles), rotate(split("k_proj"), angles), split("v_proj")
  q = q.reshape(n, s, shared, -1, size)
  scores = jnp.einsum("nsgqd,ntgd->ngqst", q, k) / math.sqrt(size)
  scores = scores.astype(jnp.promote_types(x.dtype, jnp.float32))
  causal = jnp.tril(jnp.ones([s, s], bool))
  weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1).astype(x.dtype)
  return jnp.einsum("ngqst,ntgd->nsgqd", weights, v).reshape(n, s, -1) @ layer["o_proj"]


def apply(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
  """Return logits [N, S, vocabulary] of the token after each position of int [N, S]."""
  x = params["embed"][tokens]
  angles = jnp.arange(tokens.shape[1])[:, None] * frequencies(config)
  norm = lambda x, scale: rms_norm(x, scale, config.rms_norm_eps)

  def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
    x = x + attention(config, layer, norm(x, layer["input_layernorm"]), angles)
    y = norm(x, layer["post_attention_layernorm"])
    y = jax.nn.silu(y @ layer["gate_proj"]) * (y @ layer["up_proj"])
    return x + y @ layer["down_proj"], None

  x = norm(jax.lax.scan(block, x, params["layers"])[0], params["norm"])
  return x @ (params["embed"].T if config.tie_word_embeddings else params["head"])
