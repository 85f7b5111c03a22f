"""The results of runs as plain text, CSV files and pictures.

Intervals are those of the mean over languages. Differences are paired: both methods are evaluated
on the same bytes of the same language.
"""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.languages.pictures import draw
from experiments.languages.stages import FORMAT
from experiments.report import statistics
from experiments.report.tables import markdown
from experiments.runs import files

Result = Mapping[str, Any]  # the content of results.json
BASELINE = "no_adaptation"


def bits(results: Sequence[Result], method: str, articles: int, steps: int) -> np.ndarray | None:
  """Return bits per byte [languages of the results], or None if a result lacks them.

  A language that several seeds test is one language: its number is the mean over these seeds.
  """
  if method == BASELINE:
    method, steps = "fine_tuning", 0
  found = [r["methods"][method]["bits"][str(articles)].get(str(steps)) for r in results]
  if any(one is None for one in found):
    return None
  values = np.array([math.nan if x is None else x for one in found for x in one], float)
  codes = np.array([code for r in results for code in r["languages"]["test"]])
  return np.array([values[codes == code].mean() for code in dict.fromkeys(codes.tolist())])


def having(results: Sequence[Result], method: str) -> list[Result]:
  """Return the results that contain a method, since runs may have different methods."""
  return [r for r in results if method == BASELINE or method in r["methods"]]


def methods_of(results: Sequence[Result]) -> list[str]:
  """Return the methods of all results, each once."""
  return list(dict.fromkeys(name for r in results for name in r["methods"]))


def comparison(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return a record for each number of articles, method and number of steps.

  A record has the number of languages, the mean in bits per byte, and the mean difference to
  sigma_imaml_chosen after the same steps on the same languages, each with the half width of its
  95 % interval.
  """
  config, records = results[0]["config"], []
  for articles in config["adapt"]["articles"]:
    for method in (BASELINE, *methods_of(results)):
      some = having(results, method)
      for steps in config["adapt"]["steps"][1:]:
        own = bits(some, method, articles, steps)
        ours = bits(some, "sigma_imaml_chosen", articles, steps)
        if own is None or ours is None:
          continue
        (mean, half), (far, error) = statistics.interval(own), statistics.interval(own - ours)
        record = {"articles": articles, "algorithm": method, "languages": len(own), "steps": steps}
        record |= {"bits_per_byte": mean, "bits_per_byte_ci95": half}
        record |= {"bits_difference_to_chosen": far, "bits_difference_to_chosen_ci95": error}
        records.append(record)
  return records


def overfitting(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return by articles and method: the best step, and by how much the last step is worse."""
  config, records = results[0]["config"], []
  steps = config["adapt"]["steps"]
  for articles in config["adapt"]["articles"]:
    for method in methods_of(results):
      some = having(results, method)
      known = {s: b for s in steps if (b := bits(some, method, articles, s)) is not None}
      best, last = min(known, key=lambda s: known[s].mean()), max(known)
      rise, half = statistics.interval(known[last] - known[best])
      record = {"articles": articles, "algorithm": method, "best_step": best}
      record |= {"bits_per_byte_at_best": float(known[best].mean()), "last_step": last}
      records.append(record | {"bits_difference_last": rise, "bits_difference_last_ci95": half})
  return records


def sigma(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return sigma by layer and kernel, a record for each seed."""
  return [
    {"seed": r["seed"], "module": row["kernel"], "layer": row["layer"]}
    | {key: row[key] for key in ("parameters", "norm", "sigma")}
    for r in results
    for row in r["sigma"]
  ]


def _worth(result: Result) -> list[dict[str, Any]]:
  """Return for each candidate: sigma, its gain as the only module, and its gain as the last one."""
  curve = result["choice"]["curve"]
  nothing, everything = curve[0]["loss"], curve[-1]["loss"]
  found = []
  for row in result["choice"]["table"]:
    _, kernel, layer = row["module"].split("/")
    alone, last = nothing - row["only"], row["without"] - everything
    found.append(
      {"module": kernel, "layer": int(layer.strip("[]")), "sigma": row["sigma"]}
      | {"nats_gain_alone": alone, "nats_gain_last": last}
    )
  return sorted(found, key=lambda row: (row["layer"], row["module"]))


def gains(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return by module: mean sigma and mean gains in nats per window, with intervals over seeds.

  A module that is not a candidate of every seed is left out.
  """
  by_module: dict[tuple[str, int], list[dict[str, Any]]] = {}
  for row in (row for r in results for row in _worth(r)):
    by_module.setdefault((row["module"], row["layer"]), []).append(row)
  records = []
  for (module, layer), rows in by_module.items():
    if len(rows) < len(results):
      continue
    record = {"module": module, "layer": layer, "sigma": np.mean([row["sigma"] for row in rows])}
    for column in ("nats_gain_alone", "nats_gain_last"):
      record[column], record[f"{column}_ci95"] = statistics.interval(
        np.array([row[column] for row in rows])
      )
    records.append(record)
  return records


def ranks(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return for each seed the rank correlation of sigma, over modules, with each of the gains."""
  records = []
  for r in results:
    rows = _worth(r)
    record = {"seed": r["seed"], "modules": len(rows)}
    for name in ("alone", "last"):
      pairs = np.array([(row["sigma"], row[f"nats_gain_{name}"]) for row in rows])
      with np.errstate(invalid="ignore", divide="ignore"):  # NaN if all gains are equal
        both = np.corrcoef(stats.rankdata(pairs, axis=0).T)
      record[f"rank_correlation_{name}"] = float(both[0, 1])
    records.append(record)
  return records


def path(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return the path of sets that choose_modules found, for every seed."""
  records = []
  for r in results:
    curve = r["choice"]["curve"]
    best = min(point["loss"] for point in curve)
    quantile = statistics.quantile(len(r["languages"]["validation"]))
    for point in curve:
      chosen = point["added"] is not None and point["added"] in r["chosen"]
      record = {"seed": r["seed"], "module": point["added"] or "none"}
      record |= {"nats_per_window": point["loss"], "nats_difference_to_best": point["loss"] - best}
      record |= {"nats_difference_to_best_ci95": quantile * point["error"]}
      records.append(record | {"bytes": point["bytes"], "setting": "chosen" if chosen else ""})
  return records


def sizes(results: Sequence[Result]) -> list[dict[str, Any]]:
  """Return the bytes of a language and the chosen rate, for every method and seed."""
  return [
    {"seed": r["seed"], "algorithm": name}
    | {"bytes": method["bytes"], "learning_rate": method["rate"]}
    for r in results
    for name, method in r["methods"].items()
  ]


def text(result: Result) -> str:
  """Return all tables of one run as text."""
  served, own = result["served"], result["config"]
  parts = []
  if own["data"] == "synthetic":
    parts.append("Artificial languages: these figures say nothing about real ones.")
  parts += [
    f"{result['parameters']:,} parameters; {len(result['languages']['base'])} versions to train "
    f"the base, which ends at {result['base_bits'][-1][1]:.3f} bits per byte; "
    f"{len(result['languages']['test'])} test languages.",
    "Bits per byte of the last ten articles; - chosen: minus sigma_imaml_chosen after the same "
    "steps.",
    markdown.aligned(comparison([result])),
    "Best step, and the last step minus it.",
    markdown.aligned(overfitting([result])),
    "sigma by layer and kernel; norm = sigma sqrt(parameters).",
    markdown.aligned(sigma([result])),
    "The path of choose_modules. Losses are nats per window.",
    result["choice"]["text"],
    "Bytes a language, and the rate that the validation languages chose.",
    markdown.aligned(sizes([result])),
    f"Served: {served['rows']} rows of {served['languages']} languages in one batch, "
    f"{served['bits_together']:.6f} bits per byte; one language at a time "
    f"{served['bits_one_by_one']:.6f}; largest difference of a logit "
    f"{served['largest_logit_difference']:.2g}. {served['seconds_together']:.3f} s and "
    f"{served['seconds_one_by_one']:.3f} s. {served['bytes_a_language']:,} bytes a language, "
    f"{served['bytes_on_disk']:,} on disk. Exported as a whole model: logits differ by "
    f"{served['export_logit_difference']:.2g}.",
  ]
  return "\n\n".join(parts)


def collect(paths: Iterable[pathlib.Path], out: pathlib.Path) -> None:
  """Write the CSV files of several runs of one preset, and their pictures, to a folder."""
  results = sorted((files.read_result(path, FORMAT) for path in paths), key=lambda r: r["seed"])
  settings = [{k: v for k, v in r["config"].items() if k != "methods"} for r in results]
  alike = all(
    one == settings[0] and r.get("data") == results[0].get("data")
    for one, r in zip(settings, results, strict=True)
  )
  if not alike or len({r["seed"] for r in results}) < len(results):
    raise ValueError("Collect runs that differ in seed and methods alone, and each seed once.")
  both = comparison(results)
  without = lambda column: [
    {k: v for k, v in record.items() if not k.startswith(column)} for record in both
  ]
  tables = {
    "bits": without("bits_difference"),
    "differences": [r for r in without("bits_per_byte") if r["algorithm"] != "sigma_imaml_chosen"],
    "overfitting": overfitting(results),
    "sigma": sigma(results),
    "gains": gains(results),
    "ranks": ranks(results),
    "path": path(results),
    "sizes": sizes(results),
  }
  for name, records in tables.items():
    written = [{key: markdown.cell(value) for key, value in record.items()} for record in records]
    files.write_table(out / f"{name}.csv", written)
  draw(out, results)
