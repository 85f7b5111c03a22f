"""Labels of a network's modules, and the order in which modules are listed."""

import re
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax

import shrinkmeta as sm

Cut = Literal["layer", "block"]


def modules(params: Any, cut: Cut) -> Any:
  """Return labels that say which parameters of a network share one sigma.

  Args:
    cut: "layer" makes two modules of conv_i and norm_i. "block" makes one, block_i. Without norms
      the two are the same.
  """
  if cut not in get_args(Cut):
    raise ValueError(f"modules is one of {', '.join(get_args(Cut))}; got {cut!r}.")
  layers = sm.by_layer(params)
  if cut == "layer":
    return layers
  return jax.tree.map(lambda name: re.sub("^(conv|norm)_", "block_", name), layers)


def network_order(modules: Iterable[str]) -> list[str]:
  """Sort module names from input to output: conv_0, norm_0, conv_1, ..., head.

  Names are sorted by their number, and a norm comes after the layer that it normalises. Names
  without a number come last. The order of a dictionary is of no use, because JAX sorts dictionaries
  by key.
  """

  def key(name: str) -> tuple[Any, ...]:
    numbers = tuple(int(digits) for digits in re.findall(r"\d+", name))
    return not numbers, numbers, "norm" in name.lower(), name

  return sorted(modules, key=key)
