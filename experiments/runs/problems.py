"""From settings to tasks and a network: which data set goes by which name."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

import shrinkmeta as sm
from experiments.settings import schema
from experiments.networks import convnet
from experiments.datasets.photographs import cifar_fs, grocery, mini_imagenet, tiered_imagenet
from experiments.datasets import few_shot, sinusoid
from experiments.datasets.characters import omniglot_alphabets, omniglot_few_shot
from experiments.datasets.speech import spoken_digits
from experiments.datasets.source import Problem

PyTree = Any

PROBLEMS: dict[str, Callable[..., Problem]] = {
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
  """The problem that settings["name"] names, with the arguments that stand beside the name.

  Args:
    data_dir: folder of its data, which is no setting; default $SHRINKMETA_DATA/NAME.
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


def make_model(config: schema.Config, problem: Problem) -> Model:
  """The network of config.network, with as many outputs as the problem asks for."""
  network = config.network
  if network.kind == "conv":
    net = convnet.ConvNet(problem.outputs, network.features, network.norm)
  else:
    net = convnet.MLP(problem.outputs, network.width)
  apply = functools.partial(_apply, net, problem.kind == "gaussian" and problem.outputs == 1)
  likelihood = sm.in_precision(problem.likelihood(apply), config.compute)
  example = [jnp.zeros((1, *problem.inputs))]
  if network.kind == "conv" and network.norm == "support":
    example.append(jnp.ones(1))
  init = lambda key: net.init(key, *example)["params"]
  shapes = jax.eval_shape(init, jax.random.key(0))
  return Model(init, likelihood, shapes)


def _apply(net: Any, squeeze: bool, theta: PyTree, inputs: PyTree) -> jax.Array:
  given = (inputs["x"], inputs["support"]) if isinstance(inputs, dict) else (inputs,)
  outputs = cast(jax.Array, net.apply({"params": theta}, *given))
  return outputs[..., 0] if squeeze else outputs
