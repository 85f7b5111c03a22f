import csv
import dataclasses
import json
import math
import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from experiments.runs import files, results
from experiments.runs.results import Curve
from tests.experiments.report.curves import curve


@dataclasses.dataclass(frozen=True)
class Setting:
  rate: float
  shape: tuple[int, ...]


class NumberTest(parameterized.TestCase):
  @parameterized.parameters((0.1, "0.1"), (2.0, "2"), (1e6, "1e+06"), (0.1234561, "0.1234561"))
  def test_a_short_text_is_the_same_number(self, value, text):
    self.assertEqual(results.number(value), text)
    self.assertEqual(float(text), value)


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
    results.write_json(self.path, config, curves, files.environment())
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
    results.write_json(self.path, {}, [curve()], files.environment())

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


if __name__ == "__main__":
  absltest.main()
