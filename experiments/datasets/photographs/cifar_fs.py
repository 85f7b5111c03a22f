"""CIFAR-FS: the 100 classes of CIFAR-100, 600 photographs each, split 64/16/20.

References: Bertinetto et al., Meta-learning with differentiable closed-form solvers, ICLR 2019.
"""

import functools

from experiments.datasets.files import layouts
from experiments.datasets.files.images import Counts
from experiments.datasets.photographs import photographs

DATA_SET = photographs.DataSet(
  name="cifar_fs",
  title="CIFAR-FS",
  origin="https://github.com/kjunelee/MetaOptNet",
  size=32,
  counts={
    "train": Counts(64, 38_400, 600, 600),
    "val": Counts(16, 9_600, 600, 600),
    "test": Counts(20, 12_000, 600, 600),
  },
  layouts=(
    layouts.layout(layouts.data_labels, "CIFAR_FS_{}.pickle"),
    *layouts.CSV,
  ),
)

problem = functools.partial(photographs.standard, DATA_SET)
