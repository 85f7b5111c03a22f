"""Voices: a small WaveNet over raw audio adapts to unseen speakers. Does it overfit?

    python -m experiments.speech

The network is trained on the 18 training speakers of the spoken Arabic digits. On the same speakers
sigma of every layer is learned. Then every method adapts to the 6 test speakers, on 10 or 40
recordings, for 1 to 1,000 steps, and is evaluated on 20 other recordings of the same speaker, in
nats per sample. At the end the adapted networks draw sound, as WAV files in the folder `samples` of
the run.

The default preset is cpu. synthetic uses artificial speakers and needs no data. By default results
go into runs/speech/PRESET_seedN. The same command, given again, continues a run that was stopped.
"""

import pathlib
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.settings import flags as shared
from experiments.settings import machine
from experiments.speech import pictures, presets, report, stages

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
  out = pathlib.Path(shared.or_default(_OUT, "runs/speech"))
  if _COLLECT.value:
    of_a_run = (_PRESET, _SEED, _SET, _DATA_DIR)
    if given := [f"--{flag.name}" for flag in of_a_run if flag.present]:
      raise app.UsageError(f"--collect makes no run: leave {', '.join(given)} out.")
    with shared.usage():
      report.collect([pathlib.Path(path) for path in _COLLECT.value], out)
    return
  with shared.usage():
    config = presets.load(_PRESET.value, _SET.value)
  logging.set_verbosity(logging.INFO)
  # Speakers run one after another, so one device is enough.
  machine.start_jax(devices=1)
  folder = out / f"{_PRESET.value}_seed{_SEED.value}"
  with shared.usage():
    result = stages.run(config, _SEED.value, folder, _DATA_DIR.value)
  print(report.text(result))
  pictures.draw(folder, [result])


if __name__ == "__main__":
  app.run(main)
