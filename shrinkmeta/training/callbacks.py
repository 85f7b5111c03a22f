"""Callbacks, which write the log records of a training run to a list, a terminal or a file.

`fit` makes one log record for each update and calls the callbacks in process 0 only.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, MutableSequence
from typing import Any, NamedTuple

from shrinkmeta.checks import validate
from shrinkmeta.checks.paths import Path, expanded, local_path

LogRecord = Mapping[str, float]  # the numbers of one update, {name: value}
_BEGINNING = '{"step": '  # of every line that `json_lines` writes


class Callback(NamedTuple):
  """Three functions that `fit` calls, in this order.

  Attributes:
    begin: begin(first, steps). `first` is the first step of this run: 0, or the step of the
      checkpoint from which the run continues. `steps` is the number of steps of all runs together.
    record: record(step, log_record), once for each step, in order. The log record is {name: float}.
    end: end(), after the last step. `fit` also calls it if an error ends the run. `fit` logs an
      exception of `end` and still returns the state.

  Example:
    >>> begin = lambda first, steps: print("steps", first, "to", steps - 1)
    >>> record = lambda step, log_record: print(step, log_record["loss"])
    >>> callback = Callback(begin, record, end=lambda: None)
    >>> callback.begin(0, 2)
    steps 0 to 1
    >>> callback.record(0, {"loss": 0.5})
    0 0.5
  """

  begin: Callable[[int, int], None]
  record: Callable[[int, LogRecord], None]
  end: Callable[[], None]


def recorder(records: MutableSequence[Any]) -> Callback:
  """Append every log record to a list.

  Args:
    records: the list. Each record is a dict {"step": step, name: float}.

  Returns:
    A callback for `fit`.

  Raises:
    TypeError: `records` has no method `append`.

  Example:
    >>> records = []
    >>> callback = recorder(records)
    >>> callback.record(0, {"loss": 0.5})
    >>> records
    [{'step': 0, 'loss': 0.5}]
  """
  if isinstance(records, type) or not callable(getattr(records, "append", None)):
    validate.instance("records", records, MutableSequence, "a list to append to")
  return Callback(
    lambda first, steps: None,
    lambda step, log_record: records.append({"step": step, **log_record}),
    lambda: None,
  )


def progress_bar(name: str = "fit") -> Callback:
  """Show a progress bar with the loss and the time left.

  The bar is on stderr, or in the cell of a notebook. It shows phi_loss if there is no validation
  loss, and the share of converged inner loops if the log record has it. The rate and the time left
  do not count the first update, which includes compilation.

  Args:
    name: the words before the bar.

  Returns:
    A callback for `fit`.

  Raises:
    ImportError: tqdm is not installed.
    TypeError: `name` is not a string.

  Example:
    >>> callback = progress_bar("train")
    >>> callback.begin(0, 2)
    >>> callback.record(0, {"loss": 0.5})
    >>> callback.end()
  """
  validate.instance("name", name, str, "a string")
  try:
    import tqdm.auto
  except ImportError as error:
    raise ImportError("progress_bar needs tqdm: pip install tqdm.") from error
  bars: list[tuple[Any, int]] = []  # (a bar, the first step of its run)

  def begin(first: int, steps: int) -> None:
    options = {"initial": first, "total": steps, "unit": "step", "dynamic_ncols": True}
    bars.append((tqdm.auto.tqdm(desc=name, **options), first))

  def record(step: int, log_record: LogRecord) -> None:
    bar, first = bars[-1]
    bar.set_postfix(_shown(log_record), refresh=False)
    if step == first:  # restart the clock, so that the rate leaves out the first update
      bar.n = bar.initial = bar.last_print_n = step + 1
      bar.unpause()
      bar.refresh()
    else:
      bar.update()

  return Callback(begin, record, lambda: bars.pop()[0].close())


def _shown(log_record: LogRecord) -> dict[str, str]:
  """Return the numbers of a log record that a progress bar shows, {name: text}."""
  no_loss = math.isnan(log_record["loss"]) and "phi_loss" in log_record
  name = "phi_loss" if no_loss else "loss"
  shown = {name: f"{log_record[name]:.3f}"}
  if "converged" in log_record:
    shown["converged"] = f"{100 * log_record['converged']:.0f}%"
  return shown


def tensorboard(folder: Path) -> Callback:
  """Write every finite number of a log record as a scalar for TensorBoard.

  A run that continues from a checkpoint replaces the scalars of all later steps.

  Args:
    folder: the folder for the event files. It is made if it is missing, and a leading ~ is
      expanded. The URLs gs://... and s3://... are allowed, because tensorboardX writes to buckets.

  Returns:
    A callback for `fit`.

  Raises:
    ImportError: tensorboardX is not installed.
    TypeError: `folder` is not a path.
    ValueError: `folder` is another kind of URL. `begin` raises this error.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   callback = tensorboard(folder)
    ...   callback.begin(0, 1)
    ...   callback.record(0, {"loss": 0.5})
    ...   callback.end()
    ...   len(os.listdir(folder))
    1
  """
  logdir = expanded("folder", folder)
  try:
    import tensorboardX
  except ImportError as error:
    raise ImportError("tensorboard needs tensorboardX: pip install tensorboardX.") from error
  writers: list[Any] = []

  def begin(first: int, steps: int) -> None:
    del steps
    if not str(logdir).startswith(("gs://", "s3://")):
      local_path("folder", logdir)
    writers.append(tensorboardX.SummaryWriter(str(logdir), purge_step=first))

  def record(step: int, log_record: LogRecord) -> None:
    for name, value in log_record.items():
      if math.isfinite(value):
        writers[-1].add_scalar(name, value, step)

  return Callback(begin, record, lambda: writers.pop().close())


def json_lines(path: Path) -> Callback:
  """Write every log record as one line of JSON.

  A run that continues from step n keeps the lines of the steps before n and deletes the others. So
  the finished file has one line for each step, as after an uninterrupted run.

  Args:
    path: the file. Its folder is made if it is missing, and a leading ~ is expanded. The file has
      null for NaN, and the strings "inf" and "-inf" for infinite numbers.

  Returns:
    A callback for `fit`. Its `begin` raises ValueError if `path` is a URL or the file is not a log
    of `json_lines`, and OSError if the file cannot be written. Then no update is made.

  Raises:
    TypeError: `path` is not a path.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   callback = json_lines(os.path.join(folder, "log.jsonl"))
    ...   callback.begin(0, 1)
    ...   callback.record(0, {"loss": 0.5})
    ...   callback.end()
    ...   read_json_lines(os.path.join(folder, "log.jsonl"))
    [{'step': 0, 'loss': 0.5}]
  """
  target = expanded("path", path)
  files: list[Any] = []

  def begin(first: int, steps: int) -> None:
    del steps
    file = writable_file(local_path("path", target))
    if file.is_file():  # neither a new file nor a device such as /dev/null
      _cut(file, first)
    files.append(file.open("a", encoding="utf-8"))

  def record(step: int, log_record: LogRecord) -> None:
    strict = {name: _to_json(value) for name, value in log_record.items()}
    files[-1].write(json.dumps({"step": step, **strict}, allow_nan=False) + "\n")
    files[-1].flush()

  return Callback(begin, record, lambda: files.pop().close())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
  """Read the log records that `json_lines` wrote.

  Args:
    path: the file.

  Returns:
    The log records in order, with NaN for null and infinite numbers for "inf" and "-inf". The list
    leaves out a last line that a killed run did not finish. It is empty if the file does not exist.

  Raises:
    TypeError: `path` is not a path.
    ValueError: `path` is a URL, or the file is not a log of `json_lines`.

  Example:
    >>> read_json_lines("no_such_file.jsonl")
    []
  """
  file = local_path("path", path)
  whole = [line for line in _lines(file) if line.endswith("\n")]
  records = [_parsed(file, number, line) for number, line in enumerate(whole, 1)]
  return [{name: _from_json(value) for name, value in record.items()} for record in records]


def writable_file(path: pathlib.Path) -> pathlib.Path:
  """Return the file that a path leads to, and make its folder if it is missing.

  The result has no symbolic links, so that replacing it leaves the links as they are.

  Raises:
    OSError: the file cannot be written.
  """
  file = pathlib.Path(os.path.realpath(path))
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.exists()  # the check leaves no empty file behind
    file.open("ab").close()
    if new:
      file.unlink()
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error}. Name another file.") from error
  return file


def _cut(file: pathlib.Path, first: int) -> None:
  """Delete the lines of step `first` and of later steps, and a line that a killed run began."""
  kept = []
  for number, line in enumerate(_lines(file), 1):
    if not line.endswith("\n") and _BEGINNING.startswith(line[: len(_BEGINNING)]):
      continue
    step = _parsed(file, number, line).get("step")
    if not isinstance(step, (int, float)):
      raise _not_a_log(file, f"Line {number} is {line[:80]!r}")
    if step < first:
      kept.append(line)
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  try:
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)


def _lines(file: pathlib.Path) -> list[str]:
  """Return the lines of a file with their newlines, or [] if the file does not exist."""
  try:
    return file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
  except FileNotFoundError:
    return []
  except UnicodeDecodeError as error:
    raise _not_a_log(file, f"It is not text: {error}") from error


def _parsed(file: pathlib.Path, number: int, line: str) -> dict[str, Any]:
  """Return the log record of a line."""
  with contextlib.suppress(ValueError):
    if isinstance(record := json.loads(line), dict):
      return record
  raise _not_a_log(file, f"Line {number} is {line[:80]!r}")


def _not_a_log(file: pathlib.Path, what: str) -> ValueError:
  return ValueError(
    f"{file} must be a log of json_lines, with a line of JSON for each update, such as "
    f'{{"step": 0, "loss": 0.5}}. {what}. Name another file, or mend or delete this one.'
  )


def _to_json(value: float) -> float | str | None:
  """Return a number as strict JSON can hold it."""
  if math.isnan(value):
    return None
  return str(float(value)) if math.isinf(value) else value


def _from_json(value: Any) -> Any:
  """Invert `_to_json`. A log record holds numbers only, so a string "inf" is a number too."""
  if value is None:
    return math.nan
  return float(value) if value in ("inf", "-inf") else value
