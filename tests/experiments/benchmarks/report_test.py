"""Measurements as JSON lines and as tables."""

import json

from experiments.benchmarks import report


def test_lines_are_strict_json(tmp_path):
  path = tmp_path / "new" / "out.jsonl"
  report.append(path)
  report.append(path, {"a": float("nan"), "b": (1, {"c": float("inf")})})
  report.append(path, {"d": 0.5})
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"a": None, "b": [1, {"c": None}]},
    {"d": 0.5},
  ]


def test_table_takes_rows_of_unlike_columns():
  spread = {"median": 1.0, "low": 0.5, "high": None, "repeats": 3}
  lines = report.table([{"name": "x", "seconds": spread}, {"name": "long", "slope": 2}]).split("\n")
  assert len({len(line) for line in lines}) == 1
  assert lines[0].split() == ["name", "seconds", "slope"]
  assert "1 [0.5, -]" in lines[1] and lines[2].split() == ["long", "-", "2"]


def test_environment():
  assert {"device", "cpu_count", "jax", "shrinkmeta"} <= report.environment().keys()
