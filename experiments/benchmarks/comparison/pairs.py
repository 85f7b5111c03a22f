"""Two measurements that alternate, A B A B ..., each in a process of its own."""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from experiments.benchmarks import measure, report
from experiments.benchmarks.worker import Config, spawn

_COLUMNS = (
  "own_cores",
  "other_cores",
  "contended",
  "useful_gflops",
  "matmul_gflops",
  "compile_seconds",
  "cold_start_seconds",
)


def changed(config: Config, against: Sequence[str]) -> Config:
  """Return the configuration with changes such as "batching=vmap"; text becomes the field's type.

  >>> changed(Config(), ["steps=3"]).steps
  3
  """
  values = {}
  hints = typing.get_type_hints(Config)
  for change in against:
    name, found, value = change.partition("=")
    if not found or name not in hints:
      raise ValueError(f"--against takes FIELD=VALUE, FIELD of {', '.join(hints)}; got {change!r}.")
    values[name] = _value(hints[name], change, value)
  return dataclasses.replace(config, **values)


def _value(hint: Any, change: str, text: str) -> Any:
  """Return the text of a change as a value of its field's type."""
  try:
    if hint is bool:
      return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if hint is float:
      return float(text)
    if hint in (int, int | None):
      return int(text)
    return int(text) if text.lstrip("-").isdigit() else text
  except (KeyError, ValueError) as error:
    wanted = "true or false" if hint is bool else "a number"
    raise ValueError(f"--against={change} wants {wanted}.") from error


def run(
  config: Config,
  rounds: int,
  other: Callable[[], report.Record] | None,
  keep: Callable[[report.Record], None],
) -> str:
  """Measure `config` and `other` alternately, and return a table of medians.

  With several rounds, the spread is that of the medians of the rounds. With one round, it is that
  of the repetitions.

  Args:
    config: the first side.
    rounds: how often each side is measured.
    other: measures the second side; None measures `config` alone.
    keep: receives each measurement as soon as it is made.
  """
  records: list[report.Record] = []
  for i in range(rounds):
    for side, one in (("ours", lambda: spawn(config)), ("other", other)):
      if one is not None:
        records.append({"round": i, "side": side} | one())
        keep(records[-1])
        logging.info("Round %d, %s: %s", i, side, report.cell(records[-1]["seconds"]))
  groups = {s: [r for r in records if r["side"] == s] for s in ("ours", "other")}
  lines = [_summary(group) for group in groups.values() if group]
  text = report.table(lines)
  if other is not None:
    medians = {side: [r["seconds"]["median"] for r in group] for side, group in groups.items()}
    speedup = measure.ratios(medians["other"], medians["ours"])._asdict()
    keep({"comparison": "seconds, other / ours, by round", "ratio": speedup})
    memory = [[r["peak_rss_bytes"] for r in group] for group in groups.values()]
    share = measure.ratios(memory[0], memory[1])._asdict()
    keep({"comparison": "peak memory, ours / other, by round", "ratio": share})
    text += f"\nseconds, other / ours: {report.cell(speedup)}"
    text += f"\npeak memory, ours / other: {report.cell(share)}"
  return text


def _summary(group: Sequence[Mapping]) -> report.Record:
  first = group[0]
  row = {"library": first["library"], "seconds": first["seconds"]}
  if len(group) > 1:
    medians = [r["seconds"]["median"] for r in group]
    row["seconds"] = measure.spread(medians)._asdict()
  row["peak_MB"] = max(r["peak_rss_bytes"] for r in group) / 2**20
  temp = first.get("temp_bytes")
  row["temp_MB"] = None if temp is None else temp / 2**20
  for name in _COLUMNS:
    values = [r[name] for r in group if r.get(name) is not None]
    if values and isinstance(values[0], bool):
      row[name] = any(values)
    else:
      row[name] = measure.spread(values).median if values else None
  return row
