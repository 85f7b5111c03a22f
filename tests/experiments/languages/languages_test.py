"""The experiment on languages: its likelihood, its settings, and all stages in miniature."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import shrinkmeta as sm
from experiments.datasets.text import declarations, windows
from experiments.languages import arms, model, pictures, presets, report, stages


def test_bits_per_byte_against_numpy():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 5, 256)).astype(np.float32)
  batch = windows.windows(("abcdefgh", "ijk"), 5)  # 12 bytes in 3 windows, 3 positions of padding
  likelihood = model.likelihood(lambda theta, inputs: theta)
  nats = -jnp.sum(likelihood.log_prob(jnp.asarray(logits), jnp.asarray(batch.targets)))
  wide = logits.astype(np.float64).reshape(-1, 256)
  bits = 0.0
  for row, byte in zip(wide[:12], b"abcdefgh\nijk", strict=True):
    bits -= math.log2(math.exp(row[byte]) / np.exp(row).sum())
  count = windows.num_targets(batch)
  assert count == 12
  assert windows.bits_per_byte(np.asarray(nats), count) == pytest.approx(bits / 12, rel=1e-6)


def test_blocks_hold_every_judged_byte_of_its_language():
  texts = [windows.windows((letter * n,), 4) for letter, n in (("a", 70), ("b", 9), ("c", 33))]
  blocks = arms.blocks(texts, count=8, size=8)
  assert blocks.inputs.shape == (8, 8, 4)
  for t, letter in enumerate("abc"):
    own = np.asarray(blocks.targets)[np.asarray(blocks.task) == t]
    assert set(own[own != windows.PADDING]) == {ord(letter)}
    assert (own != windows.PADDING).sum() == windows.num_targets(texts[t])
  assert (np.asarray(blocks.targets)[np.asarray(blocks.task) == 3] == windows.PADDING).all()


def test_groups_share_no_language():
  config = presets.load("synthetic")
  split = stages.split_languages(config, declarations.synthetic(), 0)
  groups = [{v.language for v in part} for part in split]
  assert sum(map(len, groups)) == len(set.union(*groups)) == 24
  assert [len(split.test), len(split.validation)] == [2, 2]  # one version a language


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("adapt.steps=(1,10)", "adapt.steps begin with 0"),
    ("adapt.steps=(0,10,5)", "ascending"),
    ("adapt.articles=(2,25)", "1 to 20 articles"),
    ("network.width=20", "multiple of 2 network.heads"),
    ("methods=('head',)", "sigma_imaml_chosen and fine_tuning are among them"),
    ("rates.head=()", "rates.head are positive numbers"),
    ("choice.candidates=99", "choice.candidates is 1 to 21"),
    ("meta.step=3", "Did you mean"),
    ("base.steps=0", "positive number"),
    ("meta.articles=21", "1 to 20 articles.*meta.articles=21"),
    ("languages.validation=1", "languages.validation must be at least 2"),
  ],
)
def test_wrong_settings(change, message):
  with pytest.raises(ValueError, match=message):
    presets.load("cpu", [change, *(["network.heads=8"] if "width" in change else [])])


def test_every_setting_has_a_meaning():
  assert set(presets.MEANINGS) == set(presets.load("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of all stages with fewer methods, and its folder."""
  folder = tmp_path_factory.mktemp("languages") / "run"
  changes = (
    "methods=('sigma_imaml_chosen','fine_tuning')",
    "base.steps=25",
    "meta.steps=1",
    "network.layers=1",
  )
  config = presets.load("synthetic", changes)
  return config, folder, stages.run(config, 0, folder, None)


def test_all_stages(finished):
  config, folder, result = finished
  assert json.loads((folder / "results.json").read_text())["format"] == stages.FORMAT
  assert result["base_bits"][-1][1] < 0.8 * result["base_bits"][0][1]
  assert len(result["sigma"]) == 7 * config.network.layers
  assert set(result["chosen"]) <= set(result["choice"]["candidates"])
  fine = result["methods"]["fine_tuning"]
  assert fine["bytes"] == 4 * result["parameters"]
  sizes = {row["module"]: row["parameters"] for row in result["sigma"]}
  chosen = result["methods"]["sigma_imaml_chosen"]
  assert chosen["bytes"] == 4 * sum(sizes[module] for module in result["chosen"])
  assert set(fine["bits"]["2"]) == {"0", "1"} and set(fine["bits"]["20"]) == {"0", "1", "5"}
  assert np.mean(fine["bits"]["20"]["5"]) < np.mean(fine["bits"]["20"]["0"])
  served = result["served"]
  assert served["languages"] == len({v.language for v in declarations.synthetic()}) == 24
  assert served["read_as_written"] and served["largest_logit_difference"] < 1e-3
  assert served["bits_together"] == pytest.approx(served["bits_one_by_one"], rel=1e-5)
  assert served["export_logit_difference"] < 1e-3
  text = report.text(result)
  assert "Artificial languages" in text and "no_adaptation" in text


def test_fine_tuning_is_judged_as_numpy_would(finished):
  config, folder, result = finished
  split = stages.split_languages(config, declarations.synthetic(), 0)
  base = jax.tree.map(np.asarray, model.train_base(config, split.base, 0, folder / "base")[0])
  batch = model.judged(config, split.test)[0]
  logits = np.asarray(jax.jit(model.predict(config))(base, jnp.asarray(batch.inputs)), np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(log_p, np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
  counts = batch.targets != windows.PADDING
  want = -(picked * counts).sum() / counts.sum() / math.log(2)
  assert result["methods"]["fine_tuning"]["bits"]["2"]["0"][0] == pytest.approx(want, rel=1e-5)


def test_a_second_start_computes_nothing_again(finished, monkeypatch):
  config, folder, result = finished
  monkeypatch.setattr(sm, "choose_modules", None)
  monkeypatch.setattr(arms, "adapt_and_judge", lambda *_: None)
  again = stages.run(config, 0, folder, None)
  assert again["methods"] == result["methods"] and again["served"] == result["served"]
  with pytest.raises(ValueError, match="holds a run that differs in seed"):
    stages.run(config, 1, folder, None)


def test_a_language_of_two_seeds_counts_once():
  of = lambda codes, values: {
    "languages": {"test": codes},
    "methods": {"head": {"bits": {"5": {"10": values}}}},
  }
  both = [of(["a", "b"], [1.0, 2.0]), of(["b", "c"], [4.0, None])]
  np.testing.assert_array_equal(report.bits(both, "head", 5, 10), [1.0, 3.0, np.nan])


def test_rank_correlations_are_those_of_scipy():
  rng = np.random.default_rng(0)
  sigma, only, without = rng.normal(size=(3, 6)).round(1)  # some are equal
  table = [
    {"module": f"layers/k/[{n}]", "sigma": sigma[n], "only": only[n], "without": without[n]}
    for n in range(6)
  ]
  result = {"seed": 3, "choice": {"table": table, "curve": [{"loss": 1.0}, {"loss": 0.0}]}}
  (found,) = report.ranks([result])
  assert (found["seed"], found["modules"]) == (3, 6)
  for name, gain in (("alone", -only), ("last", without)):
    assert found[f"rank_correlation_{name}"] == pytest.approx(stats.spearmanr(sigma, gain)[0])


def test_collected_runs(finished, tmp_path):
  _, folder, result = finished
  report.collect([folder / "results.json"], tmp_path)
  table = lambda name: (tmp_path / f"{name}.csv").read_text().splitlines()
  lines, differences = table("bits"), table("differences")
  assert lines[0] == "articles,algorithm,languages,steps,bits_per_byte,bits_per_byte_ci95"
  assert len(lines) == 1 + (1 + 2) * 3 and len(differences) == 1 + (1 + 1) * 3
  own = np.array(result["methods"]["fine_tuning"]["bits"]["20"]["5"])
  ours = np.array(result["methods"]["sigma_imaml_chosen"]["bits"]["20"]["5"])
  for rows, want in ((lines, own), (differences, own - ours)):
    row = next(line.split(",") for line in rows if line.startswith("20,fine_tuning,2,5,"))
    assert float(row[4]) == pytest.approx(want.mean(), abs=1e-4)
    half = 12.7062 * want.std(ddof=1) / math.sqrt(2)  # Student's t for two languages
    assert float(row[5]) == pytest.approx(half, abs=1e-4)
  for name in ("adaptation.png", "sigma.png"):
    assert (tmp_path / name).stat().st_size > 10_000
  (tmp_path / "other.json").write_text("{}")
  with pytest.raises(ValueError, match="no result of experiments.languages"):
    report.collect([tmp_path / "other.json"], tmp_path)
  with pytest.raises(ValueError, match="each seed once"):
    report.collect([folder / "results.json"] * 2, tmp_path)
  rows = {(row["module"], row["layer"]): row for row in report.gains([result])}
  nothing, *_, everything = (point["loss"] for point in result["choice"]["curve"])
  for one in result["choice"]["table"]:
    _, kernel, layer = one["module"].split("/")
    row = rows[kernel, int(layer.strip("[]"))]
    assert row["nats_gain_alone"] == pytest.approx(nothing - one["only"])
    assert row["nats_gain_last"] == pytest.approx(one["without"] - everything)
  assert len(rows) == 2
  path = [line.split(",") for line in table("path")]
  assert path[0][3:5] == ["nats_difference_to_best", "nats_difference_to_best_ci95"]
  assert min(float(row[3]) for row in path[1:]) == 0


def test_a_method_that_diverged_leaves_a_gap_in_the_pictures(finished, tmp_path):
  _, _, result = finished
  lost = json.loads(json.dumps(result))
  lost["methods"]["fine_tuning"]["bits"]["20"]["5"][0] = None  # NaN in JSON
  pictures.draw(tmp_path, [lost])
  assert (tmp_path / "adaptation.png").stat().st_size > 10_000
