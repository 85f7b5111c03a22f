"""Write adapters and adapted networks to files that PEFT, transformers and servers read.

`peft` and `merged` write theta, the parameters that a task uses, and not theta - phi. They
write to a temporary folder beside the target and rename it at the end, so that no reader sees a
part of the files. They need the package safetensors.
"""

import collections
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from shrinkmeta.adapters import lora, low_rank, tensors_file, trees
from shrinkmeta.adapters.trees import Adapters
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.checks.paths import Path, local_path

PyTree = Any
Names = Mapping[str, str | tuple[str, tuple[int, ...]]]


def peft(
  folder: Path,
  adapters: Adapters,
  names: Mapping[str, str],
  alpha: float | None,
  base: str,
  *,
  fan_in_fan_out: bool = False,
  task_type: str | None = "CAUSAL_LM",
  modules_to_save: Mapping[str, Mapping[str, Any]] | None = None,
) -> pathlib.Path:
  """Write one task's adapters as a PEFT folder: adapter_config.json, adapter_model.safetensors.

  PEFT multiplies by weights [out, in]. So lora_A is A^T [r, in], and lora_B is B^T [out, r]. A
  two-dimensional convolution has lora_A [r, in, height, width] and lora_B [out, r, 1, 1]. Several
  axes of one side, such as [heads, head_size], are merged into one axis. One-dimensional and
  grouped convolutions are not supported. Adapters do not show that a convolution has groups, so
  leave such kernels out yourself.

  Args:
    folder: the folder to make.
    adapters: the adapters of one task, with A and B. After `lora.hold_A`, call `lora.join` first.
    names: {path of our kernel: PEFT's module}. Give the full names of `model.named_modules()`, such
      as "model.layers.0.self_attn.q_proj". "{i}" in the name of a stacked kernel becomes the number
      of the layer. Paths without adapters are ignored.
    alpha: the alpha of `lora.attach`. None writes alpha = r for each kernel.
    base: the name or path of the base model, for `base_model_name_or_path`.
    fan_in_fan_out: True if the base stores its weights as [in, out], as GPT-2's Conv1D does.
    task_type: PEFT's task_type. None for a model that is not from transformers.
    modules_to_save: {module: {"weight": array, ...}}, the modules that the adapter replaces as a
      whole. Arrays are in PyTorch's layout, such as [out, in] for a linear layer.

  Returns:
    The path of the folder.

  Raises:
    FileExistsError: the folder exists.
    ImportError: safetensors is not installed.
    TypeError: `modules_to_save` has a leaf that is no array, or of a dtype such as int4.
    ValueError: a kernel has no name, two kernels have one name, one name ends with another name
      (PEFT would confuse the two), or PEFT cannot hold the adapters.

  Example, for one task and a network of `jax.lax.scan` over its two layers:
    >>> import pytest; _ = pytest.importorskip("safetensors")
    >>> import tempfile
    >>> one = {"q_proj": {"A": jnp.ones([2, 5, 1]), "B": jnp.ones([2, 1, 3])}}
    >>> names = {"q_proj": "model.layers.{i}.self_attn.q_proj"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   written = peft(f"{folder}/task", one, names, alpha=8.0, base="organisation/model")
    ...   sorted(file.name for file in written.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

  References: the PEFT library's checkpoint format, version 0.21.
  """
  target = local_path("folder", folder)
  _text("base", base)
  if task_type is not None:
    _text("task_type", task_type)
  fan_in_fan_out = scalars.flag("fan_in_fan_out", fan_in_fan_out)
  alpha = _alpha(alpha)
  saved = dict(_mapping("modules_to_save", modules_to_save, "{module: {name: array}}"))
  for module, arrays in saved.items():
    _mapping(f"modules_to_save[{module!r}]", arrays, "{name: array}")
  kernels = _named_kernels(adapters, names)
  ranks = {name: int(a.shape[0]) for name, (a, _) in kernels.items()}
  prefix = "base_model.model."
  tensors = {}
  for name, (a, b) in kernels.items():
    tensors[f"{prefix}{name}.lora_A.weight"] = a
    tensors[f"{prefix}{name}.lora_B.weight"] = b
  for module, arrays in saved.items():
    if clash := [name for name in ranks if f".{module}." in f".{name}."]:
      raise ValueError(
        f"modules_to_save has {module!r}, but names has an adapter for {clash[0]!r}, which is part "
        "of it. PEFT would drop the adapter. Keep one of the two."
      )
    tensors |= {f"{prefix}{module}.{key}": value for key, value in arrays.items()}
  config = {
    "task_type": task_type,
    "base_model_name_or_path": base,
    "fan_in_fan_out": fan_in_fan_out,
    "modules_to_save": sorted(saved) or None,
    **_ranks_and_alphas(ranks, alpha),
  }
  file = "adapter_model.safetensors"
  return tensors_file.write(target, file, tensors, {"adapter_config.json": config})


def _ranks_and_alphas(ranks: Mapping[str, int], alpha: float | None) -> dict[str, Any]:
  """Return the part of adapter_config.json that depends on ranks {PEFT's name: rank} and alpha."""
  usual = collections.Counter(ranks.values()).most_common(1)[0][0]
  # PEFT sorts the patterns and takes the first that matches. A pattern that is the full name of one
  # kernel cannot take the rank of another.
  unusual = {name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != usual}
  return {
    "peft_type": "LORA",
    "inference_mode": True,
    "r": usual,
    "lora_alpha": usual if alpha is None else _number(alpha),
    "lora_dropout": 0.0,
    "use_rslora": False,
    "bias": "none",
    "target_modules": sorted(ranks),
    "rank_pattern": unusual,
    "alpha_pattern": unusual if alpha is None else {},
  }


def merged(
  folder: Path,
  params: PyTree,
  adapters: Adapters,
  names: Names | None = None,
  alpha: float | None = None,
  config: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Write one task's whole network, W + (alpha / r) A B, as model.safetensors.

  Args:
    folder: the folder to make.
    params: the base network's parameters, or `lora.Base(params, A)`.
    adapters: the adapters of one task.
    names: {path of our parameter: name of the tensor, or (name, permutation)}. The file holds
      `jnp.transpose(parameter, permutation)`. A PyTorch linear layer's weight [out, in] is
      ("...weight", (1, 0)), and a convolution's weight [out, in, height, width] is
      ("...weight", (3, 2, 0, 1)). For a stack of layers, "{i}" in the name becomes the number of
      the layer, and the permutation leaves out the axis of layers. None keeps our paths, with "."
      in place of "/".
    alpha: the alpha of `lora.attach`.
    config: the contents of config.json, for example transformers' configuration as a dict. None
      writes no such file.

  Returns:
    The path of the folder.

  Raises:
    FileExistsError: the folder exists.
    ImportError: safetensors is not installed.
    TypeError: `config` is not plain data, `names` is not a dict of names, or a parameter is no
      array, or of a dtype that safetensors does not hold, such as int4.
    ValueError: a parameter has no name, two parameters have one name, or a permutation does not fit
      its parameter.

  Example:
    >>> import pytest; _ = pytest.importorskip("safetensors")
    >>> import tempfile
    >>> adapters = {"kernel": {"A": jnp.ones([2, 1]), "B": jnp.ones([1, 3])}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   written = merged(f"{folder}/task", {"kernel": jnp.zeros([2, 3])}, adapters)
    ...   [file.name for file in written.iterdir()]
    ['model.safetensors']
  """
  target = local_path("folder", folder)
  document = _mapping("config", config, "of plain data")
  alpha = _alpha(alpha)
  try:
    json.dumps(dict(document), allow_nan=False)
  except (TypeError, ValueError) as fault:
    raise TypeError(f"config must be plain data, which JSON can write: {fault}.") from fault
  leaves = trees.named_leaves(lora.merge(params, adapters, alpha))
  if names is None:
    names = {path: path.replace("/", ".") for path, _ in leaves}
  _mapping("names", names, "{path of a parameter: name of the tensor}")
  tensors: dict[str, Any] = {}
  for path, leaf in leaves:
    if path not in names:
      raise ValueError(f"names has no entry for the parameter {path!r}; it has {sorted(names)}.")
    name, permutation = _name_and_order(path, names[path], np.ndim(leaf))
    if "{i}" in name and not np.ndim(leaf):
      raise ValueError(f'names[{path!r}] has "{{i}}", but the parameter has no axis of layers.')
    for one, value in _per_layer(name, leaf):
      if one in tensors:
        raise ValueError(f"names gives the name {one!r} to two parameters; one is {path!r}.")
      tensors[one] = value if permutation is None else np.transpose(value, permutation)
  documents = {} if config is None else {"config.json": dict(document)}
  return tensors_file.write(target, "model.safetensors", tensors, documents)


def _name_and_order(path: str, entry: Any, axes: int) -> tuple[str, Sequence[int] | None]:
  """Return (name, permutation or None) of an entry of `names`, after checks."""
  name, order = entry if isinstance(entry, tuple | list) and len(entry) == 2 else (entry, None)
  name = _text(f"the name in names[{path!r}]", name)
  wanted = range(axes - ("{i}" in name))
  each = isinstance(order, Sequence) and len(order) == len(wanted) and set(order) == set(wanted)
  if order is not None and not each:
    raise ValueError(
      f"names[{path!r}] has the permutation {order!r}; it must name each of {[*wanted]} once. The "
      "axis of layers does not count."
    )
  return name, order


def _named_kernels(
  adapters: Adapters, names: Mapping[str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Return {PEFT's name: (lora_A, lora_B)} for every kernel and layer."""
  validate.instance("names", names, Mapping, "a dict {path of a kernel: module}")
  trees.kernels(adapters, wanted=("A", "B"))
  found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  for path, factors in trees.kernels(trees.stack_layers(adapters)):
    if path not in names:
      raise ValueError(f"names has no entry for the kernel {path!r}; it has {sorted(names)}.")
    name = names[path]
    _text(f"names[{path!r}]", name)
    a, b = jnp.shape(factors["A"]), jnp.shape(factors["B"])
    if "{i}" in name and not _may_be_stacked(a, b):
      raise ValueError(
        f'names[{path!r}] has "{{i}}", but A {a} and B {b} belong to one kernel without layers. '
        'Leave "{i}" out.'
      )
    pairs = zip(_per_layer(name, factors["A"]), _per_layer(name, factors["B"]), strict=True)
    for (one, a), (_, b) in pairs:
      if one in found:
        raise ValueError(f"names gives the name {one!r} to two kernels; one is {path!r}.")
      found[one] = _in_torch(path, a, b)
      if "{i}" not in name and _may_be_stacked(jnp.shape(a), jnp.shape(b)):
        raise ValueError(
          f"adapters: {path} has A {jnp.shape(a)} and B {jnp.shape(b)}, which fit one kernel and "
          'those of several layers. Of layers: put "{i}" into its name. Else: use another rank.'
        )
  for name in found:
    if longer := [other for other in found if other.endswith(f".{name}")]:
      raise ValueError(
        f"PEFT would confuse {name!r} with {longer[0]!r}, which ends in it. Give both full names."
      )
  return found


def _per_layer(name: str, array: Any) -> list[tuple[str, Any]]:
  """Return [(name, array)], with one entry for each layer if the name has "{i}"."""
  if "{i}" not in name:
    return [(name, array)]
  return [(name.replace("{i}", str(n)), array[n]) for n in range(len(array))]


def _may_be_stacked(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
  """Return whether A and B may be [layers, in, r] and [layers, r, out], or those of [out, in]."""
  try:
    return min(len(a), len(b)) > 2 and bool(low_rank.axes_of(a, b, layers=1))
  except ValueError:
    return False


def _in_torch(path: str, a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
  """Turn A and B of one kernel into lora_A [r, in, ...] and lora_B [out, r, ...]."""
  try:
    axes = low_rank.axes_of(jnp.shape(a), jnp.shape(b), layers=0)
  except ValueError as fault:
    raise ValueError(
      f'adapters: {path}: {fault} The name of a stacked kernel needs "{{i}}" for its layers.'
    ) from None
  inputs, out_first = axes.count("i"), axes.startswith("o")
  factors = zip((a, b), low_rank.labels_of(axes), strict=True)
  a, b = (low_rank.in_order(np.asarray(x), of, rank=len(axes)) for x, of in factors)
  if inputs < 3:  # a matrix
    return a.reshape(-1, a.shape[-1]).T, b.reshape(-1, b.shape[-1])
  if inputs > 3 or axes.count("o") != 1:
    raise ValueError(
      f"adapters: {path} has A {a.shape} and B {b.shape}. PEFT holds matrices and two-dimensional "
      "convolutions; leave this kernel out."
    )
  last = a if out_first else a.transpose(2, 0, 1, 3)  # [in, height, width, r]
  return np.moveaxis(last, -1, 0), b[:, :, None, None]


def _alpha(alpha: Any) -> float | None:
  """Return alpha as a finite float, or None."""
  if alpha is None:
    return None
  if not math.isfinite(number := scalars.number("alpha", alpha)):
    raise ValueError(f"alpha must be finite; got {number}.")
  return number


def _number(x: float) -> float | int:
  return int(x) if x.is_integer() else x


def _mapping(argument: str, value: Any, entries: str) -> Mapping[str, Any]:
  """Return the dict `value`, or {} for None; raise TypeError for another type."""
  if value is not None:
    validate.instance(argument, value, Mapping, f"a dict {entries}, or None")
  return value or {}


def _text(argument: str, value: Any) -> str:
  if not isinstance(value, str) or not value:
    raise TypeError(f"{argument} must be a text that is not empty; got {shown(value)}.")
  return value
