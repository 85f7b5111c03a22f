"""What is told of a training run while it goes on: to a terminal, to TensorBoard, to a file.

`fit` calls callbacks in process 0 alone.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LogRow = Mapping[str, float]  # what is known of one meta-step


class Callback(NamedTuple):
  """Three functions, in the order of their calls.

  begin(first, steps): the first step of this run, 0 or where it goes on, and the number of all.
  record(step, row): of each step, ascending.
  end(): also where an error ends the run.
  """

  begin: Callable[[int, int], None]
  record: Callable[[int, LogRow], None]
  end: Callable[[], None]


def recorder(rows: list[dict[str, float]]) -> Callback:
  """Appends each row to a list, with its step."""
  return Callback(
    lambda first, steps: None,
    lambda step, row: rows.append({"step": step, **row}),
    lambda: None,
  )


def progress_bar(name: str = "fit") -> Callback:
  """A bar with the loss and the time left; needs tqdm."""
  try:
    import tqdm
  except ImportError as error:
    raise ImportError("progress_bar needs tqdm: pip install tqdm.") from error
  bars: list[Any] = []

  def begin(first: int, steps: int) -> None:
    bars.append(tqdm.tqdm(desc=name, initial=first, total=steps, unit="step", dynamic_ncols=True))

  def record(step: int, row: LogRow) -> None:
    del step
    bars[-1].set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    bars[-1].update()

  return Callback(begin, record, lambda: bars.pop().close())


def tensorboard(folder: str | os.PathLike[str]) -> Callback:
  """A scalar for each finite entry of a row; needs tensorboardX.

  A run that goes on takes the place of what it had written beyond its checkpoint.
  """
  try:
    import tensorboardX
  except ImportError as error:
    raise ImportError("tensorboard needs tensorboardX: pip install tensorboardX.") from error
  writers: list[Any] = []

  def begin(first: int, steps: int) -> None:
    del steps
    writers.append(tensorboardX.SummaryWriter(str(folder), purge_step=first))

  def record(step: int, row: LogRow) -> None:
    for name, value in row.items():
      if math.isfinite(value):
        writers[-1].add_scalar(name, value, step)

  return Callback(begin, record, lambda: writers.pop().close())


def json_lines(path: str | os.PathLike[str]) -> Callback:
  """One JSON object a line and step, null for numbers that are not finite.

  A run that goes on from step n keeps the lines of steps before n and drops the others, so that in
  the end the file is that of an uninterrupted run.
  """
  path = pathlib.Path(path)
  files: list[Any] = []

  def begin(first: int, steps: int) -> None:
    del steps
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < first]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
      temporary.write_text("".join(kept), encoding="utf-8")
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
    files.append(path.open("a", encoding="utf-8"))

  def record(step: int, row: LogRow) -> None:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    files[-1].write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
    files[-1].flush()

  return Callback(begin, record, lambda: files.pop().close())


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a `json_lines` file, null as NaN; a last line cut short by a kill is left out."""
  nan = lambda value: math.nan if value is None else value
  rows = [json.loads(line) for line in _whole_lines(pathlib.Path(path))]
  return [{name: nan(value) for name, value in row.items()} for row in rows]


def _whole_lines(path: pathlib.Path) -> list[str]:
  with contextlib.suppress(FileNotFoundError):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
  return []
