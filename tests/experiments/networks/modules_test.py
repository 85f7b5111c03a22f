import jax
import jax.numpy as jnp
import pytest

import shrinkmeta as sm
from experiments import networks
from experiments.networks.modules import modules, network_order


def test_a_module_is_a_layer_or_a_block_with_its_norm():
  net = networks.ConvNet(3, features=4, norm="batch", blocks=2)
  params = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
  assert modules(params, "layer") == sm.by_layer(params)
  blocks = modules(params, "block")
  assert jax.tree.structure(blocks) == jax.tree.structure(params)
  assert {layer: set(own.values()) for layer, own in blocks.items()} == {
    "conv_0": {"block_0"}, "norm_0": {"block_0"}, "conv_1": {"block_1"}, "norm_1": {"block_1"},
    "head": {"head"},
  }  # fmt: skip
  mlp = networks.MLP(1).init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
  assert modules(mlp, "block") == modules(mlp, "layer")
  with pytest.raises(ValueError, match="modules is one of layer, block; got 'net'"):
    modules(params, "net")  # pyright: ignore[reportArgumentType]


def test_network_order():
  names = ["conv_0", "conv_1", "conv_10", "head", "norm_0", "norm_1", "norm_10"]
  wanted = ["conv_0", "norm_0", "conv_1", "norm_1", "conv_10", "norm_10", "head"]
  assert network_order(names) == wanted
  assert network_order(["BatchNorm_0", "Conv_0"]) == ["Conv_0", "BatchNorm_0"]
