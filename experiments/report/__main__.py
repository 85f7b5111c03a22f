"""Make one self-contained HTML page with the pictures and tables of evaluated runs.

    python -m experiments.report runs/small_data runs/sinusoid --out=report

Runs with the same protocol and settings are compared in one section. The default of --out is
report. If a run is damaged, the report has the others, and the command ends with exit code 1.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.report import browser, page
from experiments.settings import flags as shared
from experiments.settings import paths

_OUT = shared.out()
_OPEN = shared.open_page()
_EVALUATION = flags.DEFINE_string(
  "evaluation",
  "test",
  "The file to read in each run: test, validation, or a name such as test-freeze0.1.",
)


def main(argv: Sequence[str]) -> None:
  """Read the flags and write the report."""
  if len(argv) < 2:
    raise app.UsageError("Name folders of runs: python -m experiments.report runs/small_data")
  with shared.usage():
    folders = [paths.local("A folder of runs", text) for text in argv[1:]]
    out = pathlib.Path(shared.or_default(_OUT, "report"))
    written, damaged = page.write(folders, out, _EVALUATION.value)
  if _OPEN.value:
    browser.show(written)
  if damaged:
    logging.error("Left out, damaged: %s", ", ".join(map(str, damaged)))
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
