"""Networks, in flax. They know nothing of tasks, settings or algorithms."""

from experiments.networks.convnet import ConvNet
from experiments.networks.convolution import conv3x3
from experiments.networks.mlp import MLP
from experiments.networks.transformer import Transformer

__all__ = ("MLP", "ConvNet", "Transformer", "conv3x3")
