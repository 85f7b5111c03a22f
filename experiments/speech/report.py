"""The results of runs as plain text and CSV files.

Intervals are those of the mean over speakers. Differences are paired: both methods are evaluated on
the same samples of the same speaker.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.report import statistics
from experiments.report.tables import markdown
from experiments.runs import files
from experiments.speech import pictures, samples
from experiments.speech.stages import FORMAT

Result = Mapping[str, Any]  # the content of results.json
BASELINE = "no_adaptation"


def nats(
  results: Sequence[Result], method: str, recordings: int, steps: int, part: str = "held_out"
) -> np.ndarray:
  """Return nats per sample [results, speakers]; nan for a network that diverged."""
  if method == BASELINE:
    method, steps = "fine_tuning", 0
  at = list(results[0]["config"]["adapt"]["steps"]).index(steps)
  rows = [r["methods"][method]["nats"][str(recordings)][part] for r in results]
  return np.array([[math.nan if x[at] is None else x[at] for x in one] for one in rows], float)


def comparison(results: Sequence[Result], part: str = "held_out") -> list[dict[str, Any]]:
  """Return a record for each number of recordings, method and number of steps.

  A record has the mean in nats per sample, and the mean difference to sigma_imaml after the same
  steps on the same speakers, each with the half width of its 95 % interval.
  """
  config, records = results[0]["config"], []
  for recordings in config["adapt"]["recordings"]:
    for method in (BASELINE, *results[0]["methods"]):
      for steps in config["adapt"]["steps"][1:]:
        own = nats(results, method, recordings, steps, part)
        far = own - nats(results, "sigma_imaml", recordings, steps, part)
        (mean, half), (more, error) = statistics.interval(own), statistics.interval(far)
        record = {"recordings": recordings, "algorithm": method, "steps": steps}
        record |= {"nats_per_sample": mean, "nats_per_sample_ci95": half}
        record |= {"nats_difference_to_sigma_imaml": more}
        records.append(record | {"nats_difference_to_sigma_imaml_ci95": error})
  return records


def overfitting(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return by recordings and method how far the last step is above the best one.

  `stop` is the step that was best on the validation speakers, with the loss of the test speakers
  there: what early stopping would have given. Seeds may have several stops.
  """
  config, records = results[0]["config"], []
  steps = config["adapt"]["steps"]
  for recordings in config["adapt"]["recordings"]:
    for method in results[0]["methods"]:
      known = {s: nats(results, method, recordings, s) for s in steps}
      best, last = min(known, key=lambda s: np.nan_to_num(known[s].mean(), nan=math.inf)), steps[-1]
      stops = [r["methods"][method]["stop"] for r in results]
      stopped = np.concatenate(
        [nats([r], method, recordings, s) for r, s in zip(results, stops, strict=True)]
      )
      rise, half = statistics.interval(known[last] - known[best])
      record = {"recordings": recordings, "algorithm": method, "best_step": best}
      record |= {"nats_at_best": float(known[best].mean())}
      record |= {"stop": " ".join(map(str, sorted(set(stops))))}
      record |= {"nats_at_stop": float(stopped.mean()), "last_step": last}
      record |= {"nats_at_last": float(known[last].mean())}
      records.append(record | {"nats_difference_last": rise, "nats_difference_last_ci95": half})
  return records


def sigma(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return sigma of every layer, a record for each seed."""
  return [{"seed": r["seed"], **row} for r in results for row in r["sigma"]]


def rates(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return nats per sample of the validation speakers by rate and steps."""
  records = []
  for r in results:
    for name, method in r["methods"].items():
      for rate, found in method["validation_nats"].items():
        for steps, value in zip(r["config"]["tune"]["steps"], found, strict=True):
          record = {"seed": r["seed"], "algorithm": name, "learning_rate": float(rate)}
          record |= {"steps": steps, "nats_per_sample": math.nan if value is None else value}
          records.append(record)
  return records


def sizes(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return the task-specific parameters and the chosen rate of every method."""
  return [
    {"seed": r["seed"], "algorithm": name}
    | {"parameters": method["parameters"], "learning_rate": method["rate"]}
    for r in results
    for name, method in r["methods"].items()
  ]


def drawn(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return the level and the spectrum of drawn sound against the speakers' recordings."""
  records = []
  for name in samples.NETWORKS:
    record: dict[str, Any] = {"algorithm": name}
    for key, column in (
      ("level", "level_db"),
      ("spectrum", "spectral_distance_db"),
      ("nats", "nats_per_drawn_sample"),
    ):
      values = np.array([r["samples"][name][key] for r in results])
      mean, half = statistics.interval(values)
      record |= {column: mean, f"{column}_ci95": half}
    records.append(record)
  return records


def text(result: Result) -> str:
  """Return all tables of one run as text."""
  parts = []
  if result["config"]["data"] == "synthetic":
    parts.append("Artificial speakers: these figures say nothing about real ones.")
  parts += [
    f"{result['parameters']:,} parameters; the base ends at {result['base_nats'][-1][1]:.3f} nats "
    f"per sample of the {len(result['speakers']['train'])} training speakers; "
    f"{len(result['speakers']['test'])} test speakers.",
    "Nats per held-out sample; the difference is to sigma_imaml after the same steps.",
    markdown.aligned(comparison([result])),
    "Best step, step that the validation speakers chose, and the last step.",
    markdown.aligned(overfitting([result])),
    "sigma by layer; norm = sigma sqrt(parameters).",
    markdown.aligned(sigma([result])),
    "Task-specific parameters, and the rate that the validation speakers chose.",
    markdown.aligned(sizes([result])),
    "Drawn sound against the speakers' recordings.",
    markdown.aligned(drawn([result])),
  ]
  return "\n\n".join(parts)


def collect(paths: Iterable[pathlib.Path], out: pathlib.Path) -> None:
  """Write the CSV files of several runs of one preset, and their pictures, to a folder."""
  results = sorted((files.read_result(path, FORMAT) for path in paths), key=lambda r: r["seed"])
  alike = all(r[name] == results[0][name] for r in results for name in ("config", "data"))
  if not alike or len({r["seed"] for r in results}) < len(results):
    raise ValueError("Collect runs that differ in seed alone, and each seed once.")
  both, columns = comparison(results), ("nats_per_sample", "nats_difference")
  only = lambda records, other: [
    {k: v for k, v in record.items() if not k.startswith(other)} for record in records
  ]
  seen = only(comparison(results, "train"), columns[1])
  tables = {
    "nats": only(both, columns[1]),
    "differences": [r for r in only(both, columns[0]) if r["algorithm"] != "sigma_imaml"],
    "train": [r for r in seen if r["recordings"] == results[0]["config"]["adapt"]["recordings"][0]],
    "overfitting": overfitting(results),
    "sigma": sigma(results),
    "rates": rates(results),
    "sizes": sizes(results),
    "samples": drawn(results),
  }
  for name, records in tables.items():
    written = [{key: markdown.cell(value) for key, value in record.items()} for record in records]
    files.write_table(out / f"{name}.csv", written)
  pictures.draw(out, results)
