"""tieredImageNet: 608 classes of ImageNet, split 351/97/160 along its hierarchy.

References: Ren et al., Meta-learning for semi-supervised few-shot classification, ICLR 2018.
"""

import functools

from experiments.datasets.files import layouts
from experiments.datasets.files.images import Counts
from experiments.datasets.photographs import photographs

DATA_SET = photographs.DataSet(
  name="tiered_imagenet",
  title="tieredImageNet",
  origin="https://github.com/renmengye/few-shot-ssl-public",
  size=84,
  # ImageNet has 732 to 1,300 training images of a class.
  counts={
    "train": Counts(351, 448_695, 732, 1_300),
    "val": Counts(97, 124_261, 732, 1_300),
    "test": Counts(160, 206_209, 732, 1_300),
  },
  layouts=(
    layouts.layout(layouts.png_pickle, "{}_images_png.pkl", "{}_labels.pkl"),
    layouts.layout(layouts.npz, "{}_images.npz", "{}_labels.pkl"),
    *layouts.CSV,
  ),
)

problem = functools.partial(photographs.standard, DATA_SET)
