import csv
import dataclasses
import json
import math
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from experiments.runs import results
from experiments.report.tables import summaries
from experiments.runs.results import Curve


def curve(algorithm="sigma_imaml", seed=0, num_episodes=6, **changes):
  rng = np.random.default_rng([seed, len(algorithm)])
  full = Curve(
    algorithm=algorithm,
    seed=seed,
    steps=np.array([0, 1, 10]),
    accuracy=rng.uniform(size=(3, num_episodes)),
    nll=rng.uniform(size=(3, num_episodes)),
    sigma={"head": math.inf, "conv_0": 0.0, "norm_0": 0.25},
    moved={"head": 0.5, "conv_0": 0.0, "norm_0": 0.125},
    sizes={"head": 1290, "conv_0": 320, "norm_0": 64},
    seconds={"train": 1.5},
    history={"step": [0, 10], "loss": [2.5, math.nan]},
  )
  return full._replace(**changes)


def rows(table):
  """Cells of the first Markdown table in a text, by their first column."""
  lines = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in table.splitlines()
    if line.startswith("|")
  ]
  return {line[0]: line[1:] for line in lines}


@dataclasses.dataclass(frozen=True)
class Setting:
  rate: float
  shape: tuple[int, ...]


class IntervalTest(parameterized.TestCase):
  def test_three_values_by_hand(self):
    mean, half = results.interval(np.array([1.0, 2.0, 3.0]))
    self.assertEqual(mean, 2.0)
    self.assertAlmostEqual(half, 4.302653 / math.sqrt(3), places=6)  # t_{2, 0.975}, s = 1

  @parameterized.parameters(0.5, 0.95, 0.99)
  def test_is_the_interval_of_scipy(self, level):
    values = np.random.default_rng(0).normal(size=20)
    mean, half = results.interval(values, level)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    np.testing.assert_allclose([mean - half, mean + half], [low, high], rtol=1e-12)

  def test_seeds_are_averaged_within_an_episode(self):
    values = np.random.default_rng(0).normal(size=(4, 9))
    self.assertEqual(results.interval(values), results.interval(values.mean(0)))

  def test_covers_the_mean_as_often_as_it_says(self):
    values = np.random.default_rng(0).normal(size=(1000, 5))
    covered = [abs(mean) <= half for mean, half in map(results.interval, values)]
    self.assertBetween(np.mean(covered), 0.93, 0.97)

  def test_one_episode_tells_nothing_of_others(self):
    self.assertEqual(results.interval(np.array([0.5])), (0.5, math.inf))

  def test_a_diverged_episode_shows(self):
    mean, half = results.interval(np.array([1.0, math.inf]))
    self.assertEqual(mean, math.inf)
    self.assertTrue(math.isnan(half))

  def test_refuses_other_shapes(self):
    for values in (np.ones((2, 2, 2)), np.ones(0), np.ones(())):
      with self.assertRaisesRegex(ValueError, r"\[seeds, E\]"):
        results.interval(values)


class TablesTest(parameterized.TestCase):
  def test_network_order(self):
    modules = ["conv_0", "conv_1", "conv_10", "head", "norm_0", "norm_1", "norm_10"]
    self.assertEqual(
      results.network_order(modules),
      ["conv_0", "norm_0", "conv_1", "norm_1", "conv_10", "norm_10", "head"],
    )
    self.assertEqual(results.network_order(["BatchNorm_0", "Conv_0"]), ["Conv_0", "BatchNorm_0"])

  def test_accuracy_is_the_mean_over_seeds(self):
    curves = [curve("maml", seed, accuracy=np.full((3, 6), 0.5 + 0.1 * seed)) for seed in (0, 1)]
    table = summaries.accuracy_table(curves)
    self.assertEqual(rows(table.split("Negative")[0])["maml"], ["55.0 ± 0.0"] * 3)
    self.assertIn("6 episodes, each the mean of 2 seeds", table)

  def test_a_mean_of_one_run_that_diverged_is_called_so_and_a_huge_one_stays_short(self):
    nll = np.ones((3, 6))
    nll[1, 0], nll[2] = math.inf, 2.34e17
    table = summaries.accuracy_table([curve("boil", nll=nll)])
    found = rows(table.split("Negative")[1])["boil"]
    self.assertEqual(found, ["1.000 ± 0.000", "diverged", "2.3e+17 ± 0.0e+00"])
    paired = summaries.paired_table([curve("boil", nll=nll), curve()], step=1)
    self.assertEqual(rows(paired)["boil"][1], "diverged")

  def test_paired_difference_is_narrower_than_its_parts(self):
    hard = np.linspace(0.1, 0.8, 6) * np.ones((3, 1))  # tasks differ far more than algorithms
    noise = np.array([0.0, 0.01, 0.02, 0.0, 0.01, 0.02])
    ours = curve(accuracy=hard + 0.1 + noise, nll=hard)
    rival = curve("reptile", accuracy=hard, nll=hard + 0.25)
    cells = rows(summaries.paired_table([rival, ours]))
    half = 100 * stats.t.ppf(0.975, 5) * noise.std(ddof=1) / math.sqrt(6)
    self.assertEqual(cells["reptile"][:2], [f"+11.00 ± {half:.2f}", "-0.250 ± 0.000"])
    self.assertNotIn("sigma_imaml", cells)

  def test_paired_with_a_rival_that_stopped_where_it_was_best(self):
    """In each measure at a step of its own; one at which it had diverged is none."""
    at = lambda *values: np.array(values)[:, None] * np.ones(6)
    ours = curve(accuracy=at(0.1, 0.7, 0.6), nll=at(3.0, 1.0, 1.25))
    rival = curve("maml", accuracy=at(0.2, 0.5, 0.4), nll=at(1.5, math.inf, 2.0))
    cells = rows(summaries.paired_table([ours, rival]))["maml"]
    wanted = ["+20.00 ± 0.00", "-0.750 ± 0.000", "+10.00 ± 0.00 (1)", "-0.250 ± 0.000 (0)"]
    self.assertEqual(cells, wanted)
    regression = [c._replace(accuracy=np.full((3, 6), np.nan)) for c in (ours, rival)]
    cells = rows(summaries.paired_table(regression))["maml"]
    self.assertEqual(cells, [wanted[1], wanted[3]])

  def test_paired_at_another_step(self):
    a, b = curve(), curve("maml")
    mean, half = results.interval(100 * (b.accuracy[1] - a.accuracy[1]))
    cells = rows(summaries.paired_table([a, b], reference="maml", step=1))
    self.assertEqual(cells["sigma_imaml"][0], f"{mean:+.2f} ± {half:.2f}")

  def test_overfitting(self):
    accuracy = np.array([0.2, 0.8, 0.7])[:, None] * np.ones(6)
    cells = rows(summaries.overfitting_table([curve("maml", accuracy=accuracy)]))
    self.assertEqual(cells["maml"], ["1", "80.0 ± 0.0", "70.0 ± 0.0", "-10.00 ± 0.00"])

  def test_modules(self):
    cells = rows(summaries.module_table(curve()))
    self.assertEqual(list(cells)[2:], ["conv_0", "norm_0", "head"])
    self.assertEqual(cells["conv_0"], ["320", "0 (frozen)", "0"])
    self.assertEqual(cells["norm_0"], ["64", "0.25", "0.125"])
    self.assertEqual(cells["head"], ["1,290", "∞ (no prior)", "0.5"])

  def test_freezing(self):
    whole = [curve(seed=seed) for seed in (0, 1)]
    sigma = {"conv_0": 0.0, "norm_0": 0.0, "head": 0.5}
    held = [
      c._replace(accuracy=c.accuracy - 0.01, nll=c.nll + 0.125, sigma={**sigma, "norm_0": norm})
      for c, norm in zip(whole, (0.0, 0.3), strict=True)
    ]
    cells = rows(summaries.freezing_table(whole, {0.2: held, 0.1: whole}))
    share = 100 * (1_290 + 64 / 2) / (320 + 64 + 1_290)
    self.assertEqual(list(cells)[2:], ["0.1", "0.2"])
    wanted = ["norm_0 (1 of 2), head", f"{share:.1f}", "-1.00 ± 0.00", "+0.125 ± 0.000"]
    self.assertEqual(cells["0.2"], wanted)
    self.assertEqual(cells["0.1"][2:], ["+0.00 ± 0.00", "+0.000 ± 0.000"])
    with self.assertRaisesRegex(ValueError, r"below 0.1 are frozen in seeds \[0\].*\[0, 1\]"):
      summaries.freezing_table(whole, {0.1: held[:1]})

  def test_found_modules(self):
    make = lambda seed, head: curve(seed=seed, sigma={"conv_0": 0.2, "norm_0": 0.0, "head": head})
    table = summaries.found_modules({"Omniglot": [make(0, 0.1), make(1, 1.6)]})
    self.assertEqual(rows(table)["Omniglot"], ["sigma_imaml", "head 0.4, conv_0 0.2, norm_0 0"])
    two = [make(0, 0.1), make(1, 1.6)]  # the head is second in one seed, first in the other
    found = rows(summaries.sigma_table([*two, curve("sigma_maml")]))
    self.assertEqual(found["sigma_imaml"], ["0.50", "none", "head 0.4, conv_0 0.2, norm_0 0"])
    self.assertEqual(found["sigma_maml"][0], "none")  # one seed
    moving = [make(0, 0.1)._replace(sigma={"a": 1.0, "b": 2.0, "c": 4.0}) for _ in (0, 1)]
    moving[1] = moving[1]._replace(seed=1, sigma={"a": 1.0, "b": 4.0, "c": 2.0})
    self.assertEqual(rows(summaries.sigma_table(moving))["sigma_imaml"][:2], ["0.50", "0.50"])
    frozen = [curve(seed=s, sigma=dict.fromkeys(("conv_0", "norm_0", "head"), 0.0)) for s in (0, 1)]
    self.assertEqual(rows(summaries.sigma_table(frozen))["sigma_imaml"][0], "none")

  @parameterized.named_parameters(
    ("none", [], "at least one"),
    ("episodes", [curve(), curve("maml", num_episodes=5)], "6 episodes.*5 episodes for maml"),
    ("steps", [curve(), curve("maml", steps=np.array([0, 1, 9]))], r"\[0, 1, 10\].*\[0, 1, 9\]"),
    ("twice", [curve(), curve()], "two of sigma_imaml, seed 0"),
  )
  def test_refuses_what_cannot_be_compared(self, curves, message):
    for table in (summaries.accuracy_table, summaries.paired_table, summaries.overfitting_table):
      with self.assertRaisesRegex(ValueError, message):
        table(curves)

  def test_refuses_an_unknown_reference_or_step(self):
    with self.assertRaisesRegex(ValueError, "one of maml; got 'sigma_imaml'"):
      summaries.paired_table([curve("maml")])
    with self.assertRaisesRegex(ValueError, "got 10. Pass a position"):
      summaries.paired_table([curve()], step=10)


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "result.json"

  def files(self):
    return sorted(file.name for file in self.path.parent.iterdir())

  def write(self, **changes):
    """A good file, then `changes` to its first curve, or to the top for "top_…"."""
    results.write_json(self.path, {}, [curve()], {})
    with open(self.path) as file:
      document = json.load(file)
    for name, value in changes.items():
      if name.startswith("top_"):
        document[name.removeprefix("top_")] = value
      elif value is None:
        del document["curves"][0][name]
      else:
        document["curves"][0][name] = value
    with open(self.path, "w") as file:
      json.dump(document, file)

  def test_json_round_trip(self):
    curves = [curve(), curve("maml", 1, nll=np.full((3, 6), math.inf))]
    config = {
      "setting": Setting(0.1, (14, 14)),
      "sigma": math.inf,
      "rows": np.arange(2),
      "nested": {"none": None, "on": True},
    }
    results.write_json(self.path, config, curves, results.environment())
    loaded, again = results.read_json(self.path)
    self.assertEqual(
      loaded,
      {
        "setting": {"rate": 0.1, "shape": [14, 14]},
        "sigma": math.inf,
        "rows": [0, 1],
        "nested": {"none": None, "on": True},
      },
    )
    self.assertLen(again, 2)
    for old, new in zip(curves, again, strict=True):
      for field in Curve._fields:
        np.testing.assert_equal(getattr(new, field), getattr(old, field), err_msg=field)

  def test_json_is_strict(self):
    results.write_json(self.path, {}, [curve()], results.environment())

    def refuse(literal):
      self.fail(f"{literal} is not JSON")

    with open(self.path) as file:
      document = json.load(file, parse_constant=refuse)
    self.assertEqual(document["curves"][0]["sigma"]["head"], "inf")
    self.assertEqual(document["seeds"], [0])
    self.assertContainsSubset(
      ["jax", "jaxlib", "flax", "optax", "numpy", "python", "shrinkmeta", "device", "platform"],
      document["environment"],
    )

  def test_csv(self):
    results.write_csv(self.path, [curve(), curve("maml", 1, nll=np.full((3, 6), math.inf))])
    with open(self.path, newline="") as file:
      read = list(csv.DictReader(file))
    self.assertLen(read, 2 * 3 * 6)
    self.assertEqual(list(read[0]), ["algorithm", "seed", "episode", "step", "accuracy", "nll"])
    found = {(r["algorithm"], r["episode"], r["step"]): float(r["accuracy"]) for r in read}
    self.assertEqual(found["sigma_imaml", "4", "10"], curve().accuracy[2, 4])
    self.assertEqual(float(read[-1]["nll"]), math.inf)

  @parameterized.named_parameters(
    ("missing", {"nll": None}, r"curves\[0\]: missing or unknown nll"),
    ("unknown", {"loss": 1}, r"curves\[0\]: missing or unknown loss"),
    ("shape", {"nll": [[1.0]] * 3}, r"curves\[0\]: nll is \[3, 6\]"),
    ("ragged", {"accuracy": [[1.0], [1.0, 2.0], [1.0]]}, r"accuracy .* unequal length"),
    ("text", {"accuracy": [["high"] * 6] * 3}, r"accuracy is an array of numbers"),
    ("order", {"steps": [0, 10, 1]}, r"steps is ascending"),
    ("fraction", {"steps": [0.0, 0.5, 1.0]}, r"steps is a list of integers"),
    ("seed", {"seed": "0"}, r"seed is an integer"),
    ("sigma", {"sigma": {"head": "wide"}}, r"sigma is a dictionary"),
    ("sizes", {"sizes": {"head": 0.5}}, r"sizes is a dictionary"),
    ("history", {"history": {"loss": 1.0}}, r"history is a dictionary from names to lists"),
    ("format", {"top_format": "other"}, r"format is 'other'"),
    ("config", {"top_config": []}, r"config is a dict; got list"),
    ("curves", {"top_curves": {}}, r"curves is a list; got dict"),
    ("nan", {"seconds": {"train": math.nan}}, r"NaN is not JSON"),
  )
  def test_names_the_broken_field(self, changes, message):
    self.write(**changes)
    with self.assertRaisesRegex(ValueError, message):
      results.read_json(self.path)

  @parameterized.parameters(
    ("", "is not JSON"), ('{"a": ', "is not JSON"), ("[]", "holds a list"), ("{}", "format is None")
  )
  def test_names_a_foreign_file(self, text, message):
    with open(self.path, "w") as file:
      file.write(text)
    with self.assertRaisesRegex(ValueError, f"{self.path}.*{message}"):
      results.read_json(self.path)

  def test_a_failed_write_leaves_the_old_file(self):
    results.write_json(self.path, {"run": 1}, [curve()], {})
    with self.assertRaisesRegex(ValueError, r"config\.f is data .* got a function"):
      results.write_json(self.path, {"f": lambda: 0}, [curve()], {})
    with self.assertRaisesRegex(ValueError, r"curves\[1\]: nll"):  # after rows were written
      results.write_csv(self.path, [curve(), curve(nll=np.ones((3, 1)))])
    self.assertEqual(results.read_json(self.path)[0], {"run": 1})
    self.assertEqual(self.files(), ["result.json"])

  def test_atomic_hides_the_file_until_it_is_whole(self):
    with self.assertRaises(KeyboardInterrupt), results.atomic(self.path) as temporary:
      temporary.write_text("half")
      self.assertNotIn("result.json", self.files())
      raise KeyboardInterrupt
    self.assertEqual(self.files(), [])


if __name__ == "__main__":
  absltest.main()


def test_the_table_of_settings_leaves_out_what_no_algorithm_uses():
  table = summaries.settings_table(
    {
      "maml": {"inner_rate": 0.5, "inner_decay": 0, "searched_with": "", "trials": 0},
      "sigma_imaml": {"inner_rate": 0.2, "inner_decay": 0, "init_sigma": 0.3, "trials": 0},
    }
  )
  header, rows = table.splitlines()[2], table.splitlines()[4:]
  cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
  assert cells(header) == ["algorithm", "inner_rate", "trials", "init_sigma"]
  assert [cells(row) for row in rows] == [
    ["maml", "0.5", "0", ""],
    ["sigma_imaml", "0.2", "0", "0.3"],
  ]
