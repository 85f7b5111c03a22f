"""Low-rank adapters for new languages: which kernels need them, and do they overfit?

    python -m experiments.languages

A byte-level Transformer is trained on the Universal Declaration of Human Rights in some 360
languages and then frozen. Other languages serve to learn sigma of every adapter, and choose_modules
picks a few kernels. Then every method adapts to new languages, on their first 2 to 20 articles. The
loss is measured on their last ten articles, in bits per byte. At the end, the adapted languages are
stored, served in one batch and exported.

The default preset is cpu. full is for a GPU. synthetic uses artificial languages and needs no data.
By default results go into runs/languages/PRESET_seedN. The same command, given again, continues a
run that was stopped.
"""

import pathlib
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.languages import presets, report, stages
from experiments.settings import flags as shared
from experiments.settings import machine

_PRESET = flags.DEFINE_enum("preset", "cpu", list(presets.PRESETS), "The sizes of the run.")
_SEED = shared.seed()
_SET = shared.changes()
_DATA_DIR = shared.data_dir()
_OUT = shared.out()
_COLLECT = flags.DEFINE_list(
  "collect", [], "Files results.json to convert to CSV files in --out, instead of a run."
)


def main(argv: Sequence[str]) -> None:
  """Read the flags, run the stages, and print and draw what they found."""
  shared.no_arguments(argv)
  out = pathlib.Path(shared.or_default(_OUT, "runs/languages"))
  if _COLLECT.value:
    with shared.usage():
      report.collect([pathlib.Path(path) for path in _COLLECT.value], out)
    return
  with shared.usage():
    config = presets.load(_PRESET.value, _SET.value)
  logging.set_verbosity(logging.INFO)
  # Rows of a batch share one device here: all products are small.
  machine.start_jax(devices=1)
  folder = out / f"{_PRESET.value}_seed{_SEED.value}"
  with shared.usage():
    result = stages.run(config, _SEED.value, folder, _DATA_DIR.value)
  print(report.text(result))
  report.draw(folder, [result])


if __name__ == "__main__":
  app.run(main)
