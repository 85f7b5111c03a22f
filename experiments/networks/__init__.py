"""Networks, in flax."""

from experiments.networks.convnet import ConvNet
from experiments.networks.convolution import conv3x3

__all__ = ("ConvNet", "conv3x3")
