"""miniImageNet: 100 classes of 600 photographs, split 64/16/20 by Ravi and Larochelle.

References: Vinyals et al., Matching networks for one shot learning, NeurIPS 2016. Ravi and
  Larochelle, Optimization as a model for few-shot learning, ICLR 2017.
"""

import functools

from experiments.datasets.files import layouts
from experiments.datasets.files.images import Counts
from experiments.datasets.photographs import photographs

DATA_SET = photographs.DataSet(
  name="mini_imagenet",
  title="miniImageNet",
  origin="https://github.com/renmengye/few-shot-ssl-public",
  size=84,
  counts={
    "train": Counts(64, 38_400, 600, 600),
    "val": Counts(16, 9_600, 600, 600),
    "test": Counts(20, 12_000, 600, 600),
  },
  layouts=(
    layouts.layout(layouts.class_dict, "mini-imagenet-cache-{}.pkl"),
    layouts.layout(
      layouts.data_labels, "miniImageNet_category_split_{}.pickle", train="train_phase_train"
    ),
    *layouts.CSV,
  ),
)

problem = functools.partial(photographs.standard, DATA_SET)
