"""The command `experiments.mixed`: its text, its JSON, its flags, and errors for wrong flags."""

import json
import os
import pathlib

import numpy as np
import pytest

DATA = pathlib.Path(os.environ.get("SHRINKMETA_DATA", "/nonexistent")) / "mixed"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="SHRINKMETA_DATA has no folder mixed")


@pytest.fixture(scope="module")
def bees(tmp_path_factory):
  """A file with semicolons, decimal commas, comments and a spelling of its own for missing."""
  rng = np.random.default_rng(0)
  lines = ["% hives of two years", "dead;n;dose;hive;year"]
  for i in range(120):
    n, dose = rng.integers(4, 12), rng.uniform(0, 2)
    dead = rng.binomial(n, 1 / (1 + np.exp(1 - dose - 0.8 * np.sin(i // 10))))
    text = f"{dose:.3f}".replace(".", ",")
    lines.append(f"{dead};{n};{text if i else 'lost'};{i // 10:02};{2020 + i % 2}")
  path = tmp_path_factory.mktemp("mixed") / "bees.csv"
  path.write_bytes("\n".join(lines).encode("latin-1"))
  return path


def flags(**values):
  return [f"--{name}={value}" for name, value in values.items()]


@needs_data
def test_sleepstudy_by_maximum_likelihood(tmp_path, command):
  """The published fit."""
  out, plot = tmp_path / "fit.json", tmp_path / "fit.png"
  formula = "Reaction ~ Days + (Days || Subject)"
  done = command(
    "mixed", *flags(data=DATA / "sleepstudy.csv", formula=formula, json=out, plot=plot)
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "log-likelihood -876.0016" in done.stdout
  found = json.loads(out.read_text())
  assert found["fixed"]["(Intercept)"] == pytest.approx(251.405, abs=5e-4)
  assert found["fixed"]["Days"] == pytest.approx(10.467, abs=5e-4)
  assert found["sd"]["(Intercept)"] == pytest.approx(24.171, abs=1e-3)
  assert found["sd"]["Days"] == pytest.approx(5.799, abs=1e-3)
  assert found["residual"] == pytest.approx(25.556, abs=1e-3)
  assert found["log_likelihood"] == pytest.approx(-876.0016, abs=1e-4)
  assert found["converged"] and found["singular"] == [] and found["rows"] == 180
  assert len(found["groups"]) == 18 and plot.stat().st_size > 10_000
  group = found["groups"]["308"]
  assert group["rows"] == 10 and set(group["terms"]) == {"(Intercept)", "Days"}
  # The group's own regression, by least squares.
  rows = np.loadtxt(DATA / "sleepstudy.csv", delimiter=",", skiprows=1)
  own = np.polyfit(*rows[rows[:, 2] == 308][:, [1, 0]].T, 1)
  terms = group["terms"]
  assert terms["Days"]["unshrunk"] == pytest.approx(own[0])
  low, high = sorted((found["fixed"]["Days"], own[0]))
  assert low < terms["Days"]["estimate"] < high and terms["Days"]["sd"] > 0


def test_every_flag_reaches_the_fit(bees, tmp_path, command):
  new = tmp_path / "new.csv"
  new.write_text("dose;hive;year\n0,5;03;2021\n0,5;elsewhere;2021\n")
  out = tmp_path / "fit.json"
  done = command(
    "mixed",
    *flags(
      data=bees, formula="dead ~ dose + factor(year) + (1 | hive)", family="logistic", trials="n",
      weights="I(1 + 0 * n)", sep="semicolon", decimal=",", na="lost", encoding="latin-1",
      comment="%", predict=new, json=out, plot=tmp_path / "all.svg", picture="all",
    ),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  assert "1 row left out: dose is missing (1)" in done.stdout
  assert "a new group" in done.stdout
  found = json.loads(out.read_text())
  assert set(found["fixed"]) == {"(Intercept)", "dose", "C(year)[T.2021]"}
  assert found["dropped"] == {"dose is missing": 1} and found["rows"] == 119
  assert list(found["groups"])[:2] == ["00", "01"]
  assert (
    found["residual"] is None and found["groups"]["00"]["terms"]["(Intercept)"]["unshrunk"] is None
  )
  assert found["aic"] == pytest.approx(-2 * found["log_likelihood"] + 8)
  predictions = found["predictions"]
  assert predictions["known"] == [True, False] and len(predictions["mean"]) == 2
  assert predictions["se"][0] < predictions["se"][1] and predictions["new_low"] == [None, None]
  assert (tmp_path / "all.svg").read_text().startswith("<?xml")


def test_nested_groups_by_their_factor(bees, tmp_path, command):
  out = tmp_path / "fit.json"
  formula = "dose ~ 1 + (1 | hive/year)"
  common = flags(data=bees, formula=formula, json=out, comment="%", na="lost")
  done = command("mixed", *common, "--profile")
  assert done.returncode == 0 and "by profile" in done.stdout, done.stderr[-3000:]
  found = json.loads(out.read_text())
  low, high = found["sd_profile"]["residual"]
  assert low < found["residual"] < high
  assert set(found["sd"]) == {"hive (Intercept)", "hive:year (Intercept)"}
  assert set(found["groups"]) == {"hive", "hive:year"}
  assert found["groups"]["hive:year"]["03:2020"]["rows"] == 5
  assert set(found["groups"]["hive"]["03"]["terms"]) == {"(Intercept)"}


def test_the_predictive_estimate_has_no_errors_and_no_intervals(bees, tmp_path, command):
  """Its criterion is no log likelihood of phi and sigma."""
  out = tmp_path / "fit.json"
  common = {
    "data": bees,
    "formula": "dose ~ n + (1 | hive)",
    "json": out,
    "comment": "%",
    "na": "lost",
  }
  done = command("mixed", *flags(**common, estimator="predictive", seed=3))
  assert done.returncode == 0, done.stderr[-3000:]
  assert "95 %" not in done.stdout and "nan" not in done.stdout and "[" not in done.stdout
  found = json.loads(out.read_text())
  assert set(found["fixed_se"].values()) == {None} and found["aic"] is None
  assert found["sd_interval"] == {"(Intercept)": None} and found["residual_interval"] is None
  assert found["seed"] == 3 and found["estimator"] == "predictive"


@pytest.mark.parametrize(
  "arguments, message",
  (
    ((), "Give --data and --formula"),
    (("--data=nothing.csv", "--formula=y ~ (1 | g)"), "no file nothing.csv"),
    (("--data=nothing.csv", "--formula=y ~ (1 | g)", "--plot=p.xyz"),
     "p.xyz must end in one of .png"),
    (("--data=nothing.csv", "--formula=y ~ (1 | g)", "--plot=p.PNG"), "no file nothing.csv"),
    (("--simulate=2", "--data=nothing.csv"), "--simulate makes its data"),
    (("--simulate=2", "--seed=1", "--json=x.json", "--family=poisson", "--estimator=reml",
      "--profile", "--picture=all", "--weights=w"),
     "leave --family, --estimator, --weights, --profile, --picture out"),
    (("--data={bees}", "--comment=%", "--formula=dead ~ dose + (1 | hive)", "--estimator=reml",
      "--family=poisson", "--na=lost"), "reml is for the gaussian family"),
    (("--data={bees}", "--comment=%", "--formula=dead ~ dose + (1 | hive) + (1 | year)",
      "--na=lost"), "crossed"),
    (("--data={bees}", "--comment=%", "--formula=dead ~ dose + (1 | hive)"),
     "'lost' in row 1 .line 3 of bees.csv"),
    (("--data={bees}", "--comment=%", "--formula=dead ~ open('x') + (1 | hive)"),
     "is not a function of formulas"),
    (("--data={bees}", "--formula=dead ~ dose + (1 | hive)"),
     "row 3 .line 4.: 2 fields.*comment='%'"),
  ),
)  # fmt: skip
def test_the_binary_says_what_is_wrong(arguments, message, bees, command):
  import re

  done = command("mixed", *(argument.format(bees=bees) for argument in arguments))
  said = " ".join((done.stdout + done.stderr).split())
  assert done.returncode != 0 and re.search(message, said), said[-1500:]
  assert "Traceback" not in said
