"""The tasks and the network that settings name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

import shrinkmeta as sm
from experiments import networks
from experiments.datasets import few_shot, sinusoid
from experiments.datasets.characters import (
  omniglot_alphabets,
  omniglot_few_shot,
  writing_systems,
)
from experiments.datasets.photographs import cifar_fs, grocery, mini_imagenet, tiered_imagenet
from experiments.datasets.source import Problem
from experiments.datasets.speech import spoken_digits
from experiments.settings.schema import Config

PyTree = Any

PROBLEMS: dict[str, Callable[..., Problem]] = {
  "writing_systems": writing_systems.problem,
  "omniglot_alphabets": omniglot_alphabets.problem,
  "omniglot_few_shot": omniglot_few_shot.problem,
  "mini_imagenet": mini_imagenet.problem,
  "tiered_imagenet": tiered_imagenet.problem,
  "cifar_fs": cifar_fs.problem,
  "grocery": grocery.problem,
  "spoken_digits": spoken_digits.problem,
  "sinusoid": sinusoid.problem,
}


class Model(NamedTuple):
  """A network for a problem."""

  init: Callable[[jax.Array], PyTree]  # key -> params
  likelihood: sm.Likelihood
  shapes: PyTree  # of params


def make_problem(settings: Mapping[str, Any], data_dir: str | None = None) -> Problem:
  """Return the problem named settings["name"]; the other settings are its arguments.

  Args:
    settings: `config.problem`.
    data_dir: the folder of its data; default $SHRINKMETA_DATA/NAME. It is not a setting, because it
      does not change the results.
  """
  arguments = dict(settings)
  name = arguments.pop("name")
  if name not in PROBLEMS:
    raise ValueError(f"{name!r} is no problem; choose of {', '.join(PROBLEMS)}.")
  if "shape" in arguments:
    arguments["shape"] = few_shot.FewShot(**arguments["shape"])
  if data_dir is not None:
    if name == "sinusoid":
      raise ValueError(f"Sinusoids are made, not read; got data_dir {data_dir!r}. Leave it out.")
    arguments["data_dir"] = data_dir
  return PROBLEMS[name](**arguments)


def make_model(config: Config, problem: Problem) -> Model:
  """Return the network of config.network, with as many outputs as the problem needs."""
  network = config.network
  if network.kind == "conv":
    net = networks.ConvNet(problem.outputs, network.features, network.norm)
  else:
    activation = "tanh" if network.kind == "tanh_mlp" else "relu"
    net = networks.MLP(problem.outputs, network.width, activation)
  apply = functools.partial(_apply, net, problem.kind == "gaussian" and problem.outputs == 1)
  likelihood = sm.in_precision(problem.likelihood(apply), config.compute)
  example = [jnp.zeros((1, *problem.inputs))]
  if network.kind == "conv" and network.norm == "support":
    example.append(jnp.ones(1))
  init = jax.jit(lambda key: net.init(key, *example)["params"])  # one program, not one an operation
  shapes = jax.eval_shape(init, jax.random.key(0))
  return Model(init, likelihood, shapes)


def _apply(net: Any, squeeze: bool, theta: PyTree, inputs: PyTree) -> jax.Array:
  given = (inputs["x"], inputs["support"]) if isinstance(inputs, dict) else (inputs,)
  outputs = cast(jax.Array, net.apply({"params": theta}, *given))
  return outputs[..., 0] if squeeze else outputs
