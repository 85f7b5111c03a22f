"""The experiment on voices: its likelihood, its settings, and all stages in miniature."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile

import shrinkmeta as sm
from experiments.networks.audio import wavenet
from experiments.speech import arms, model, presets, report, samples, stages


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("adapt.steps=(1,10)", "adapt.steps begin with 0"),
    ("adapt.steps=(0,10,5)", "adapt.steps are ascending"),
    ("tune.steps=()", "tune.steps are ascending"),
    ("tune.steps=(0,7)", "tune.steps are some of adapt.steps, .*got 7"),
    ("adapt.recordings=(10,15)", "10, 20, 30 or 40.*got 15"),
    ("meta.recordings=60", "evaluated on the last two of six rounds; got 60"),
    ("network.dilations=(0,1)", "network.dilations are at least 1"),
    ("methods=('head',)", "sigma_imaml and fine_tuning are among them"),
    ("rates.head=()", "rates.head are positive numbers"),
    ("adapt.pieces=61", "adapt.pieces is at most 60"),
    ("samples=100", "samples is at least pieces.length, 256"),
    ("data='birds'", '"digits" or "synthetic"'),
    ("meta.step=3", "Did you mean"),
    ("base.steps=0", "positive number"),
  ],
)
def test_wrong_settings(change, message):
  with pytest.raises(ValueError, match=message):
    presets.load("cpu", [change])


def test_every_setting_has_a_meaning():
  assert set(presets.MEANINGS) == set(presets.load("cpu"))


STILL = sm.Inner(optax.sgd(0.1), steps=0)
SETTINGS = (
  "methods=('sigma_imaml','fine_tuning')",
  "network.dilations=(2,)",
  "base.steps=40",
  "adapt.recordings=(10,)",
  "meta.steps=1",
  "meta.inner_steps=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of all stages with fewer methods, whose first start stops in the base; its folder."""
  folder = tmp_path_factory.mktemp("speech") / "run"
  config = presets.load("synthetic", SETTINGS)
  fit = sm.fit
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sm, "fit", lambda *given, **more: fit(*given[:3], 25, **more))
    with pytest.raises(KeyboardInterrupt, match="after 25 of 40 updates, and no result"):
      model.train_base(config, model.load(config)["train"], 0, folder / "base")
  return config, folder, stages.run(config, 0, folder, None)


def test_all_stages(finished):
  config, folder, result = finished
  assert json.loads((folder / "results.json").read_text())["format"] == stages.FORMAT
  assert result["base_nats"][-1][1] < 0.9 * result["base_nats"][0][1]
  assert [row["module"] for row in result["sigma"]] == ["embed", "layer_0", "head_0", "head_1"]
  assert sum(row["parameters"] for row in result["sigma"]) == result["parameters"]
  assert all(row["sigma"] != config.meta.init_sigma for row in result["sigma"])
  for method in result["methods"].values():
    held_out = np.array(method["nats"]["10"]["held_out"])
    assert held_out.shape == (2, 3) and method["parameters"] == result["parameters"]
    assert np.ptp(held_out[:, 1:]) > 0
  ours, fine = (result["methods"][name]["nats"]["10"] for name in ("sigma_imaml", "fine_tuning"))
  for part in ("held_out", "train"):  # all methods begin at one phi
    np.testing.assert_array_equal(np.array(ours[part])[:, 0], np.array(fine[part])[:, 0])
  assert np.mean(np.array(fine["train"])[:, -1]) < np.mean(np.array(fine["train"])[:, 0])
  text = report.text(result)
  assert "Artificial speakers" in text and "no_adaptation" in text


def test_held_out_nats_are_those_of_numpy(finished):
  config, folder, result = finished
  everyone = model.load(config)["test"]
  base, _ = model.train_base(config, model.load(config)["train"], 0, folder / "base")
  batch = everyone.batch([1], [4, 5])  # the rounds that no method adapts on
  inputs, targets = batch.inputs[0], batch.targets[0]
  logits = np.asarray(jax.jit(model.predict(config))(base, jnp.asarray(inputs)), np.float64)
  total = 0.0
  for n, row in enumerate(targets):
    for s, level in enumerate(row):
      total += math.log(np.exp(logits[n, s] - logits[n, s, level]).sum())
  found = result["methods"]["fine_tuning"]["nats"]["10"]["held_out"][1][0]
  assert found == pytest.approx(total / targets.size, rel=1e-5)
  own = model.likelihood(config)
  log_prob = np.asarray(own.log_prob(jnp.asarray(logits, jnp.float32), jnp.asarray(targets)))
  assert log_prob.shape == (len(targets),)
  assert -log_prob.sum() == pytest.approx(total, rel=1e-5)


def test_a_second_start_computes_nothing_again(finished, monkeypatch):
  config, folder, result = finished
  monkeypatch.setattr(arms, "adapt_and_evaluate", lambda *_: None)
  monkeypatch.setattr(samples, "stage", None)
  again = stages.run(config, 0, folder, None)
  assert again["methods"] == result["methods"] and again["samples"] == result["samples"]
  with pytest.raises(ValueError, match="holds a run that differs in seed"):
    stages.run(config, 1, folder, None)


def test_a_stopped_run_ends_like_an_uninterrupted_one(finished, tmp_path):
  config, folder, result = finished
  speakers = model.load(config)["train"]
  stopped, _ = model.train_base(config, speakers, 0, folder / "base")
  whole, losses = model.train_base(config, speakers, 0, tmp_path)
  assert len(losses) == config.base.steps
  jax.tree.map(np.testing.assert_array_equal, whole, stopped)
  assert result["base_nats"] == [[i + 1, loss] for i, loss in enumerate(losses)]


def test_drawn_sound(finished):
  config, folder, result = finished
  for name in samples.NETWORKS:
    sound, rate = soundfile.read(folder / "samples" / f"{name}.wav")
    assert rate == 8_000 and sound.shape == (config.samples,)
    drawn = result["samples"][name]
    assert len(drawn["levels"]) == config.samples and np.ptp(sound) > 0
    assert all(0 < nats < 2 * math.log(256) for nats in drawn["nats"])


def test_level_and_spectrum_of_a_tone():
  time = np.arange(800) / 8_000
  tone = np.stack([0.5 * np.sin(2 * np.pi * f * time) for f in (1_250.0, 3_250.0)])[:, None]
  half = 10 * math.log10(0.5**2 / 2)
  np.testing.assert_allclose(samples.loudness(tone), half, atol=1e-6)
  bands = samples.spectrum(tone)  # of 500 Hz
  assert bands.argmax(-1).tolist() == [2, 6]
  np.testing.assert_allclose(bands.max(-1), 0.0, atol=1e-3)


def test_flags_of_a_run_have_no_meaning_for_collected_runs(command):
  done = command("speech", "--collect=x.json", "--seed=1", "--preset=synthetic")
  told = " ".join((done.stderr + done.stdout).split())
  assert done.returncode == 1 and "leave --preset, --seed out" in told


def test_collected_runs(finished, tmp_path):
  _, folder, result = finished
  report.collect([folder / "results.json"], tmp_path)
  table = lambda name: (tmp_path / f"{name}.csv").read_text().splitlines()
  lines, differences = table("nats"), table("differences")
  assert lines[0] == "recordings,algorithm,steps,nats_per_sample,nats_per_sample_ci95"
  assert len(lines) == 1 + (1 + 2) * 2 and len(differences) == 1 + 2 * 2
  at = lambda name: np.array(result["methods"][name]["nats"]["10"]["held_out"])[:, 2]
  own, ours = at("fine_tuning"), at("sigma_imaml")
  # Cells have four digits; small ones have two.
  for rows, want, rel in ((lines, own, 2e-3), (differences, own - ours, 0.05)):
    row = next(line.split(",") for line in rows if line.startswith("10,fine_tuning,5,"))
    assert float(row[3]) == pytest.approx(want.mean(), rel=rel, abs=1e-4)
    half = 12.7062 * want.std(ddof=1) / math.sqrt(2)  # Student's t for two speakers
    assert float(row[4]) == pytest.approx(half, rel=0.05, abs=1e-4)
  for name in ("adaptation.png", "sigma.png", "sigma_history.png", "samples.png"):
    assert (tmp_path / name).stat().st_size > 10_000
  (tmp_path / "other.json").write_text("{}")
  with pytest.raises(ValueError, match="no result of experiments.speech"):
    report.collect([tmp_path / "other.json"], tmp_path)
  with pytest.raises(ValueError, match="each seed once"):
    report.collect([folder / "results.json"] * 2, tmp_path)


def test_seeds_are_no_more_speakers(finished):
  result = finished[2]
  half = lambda results: next(
    (row["nats_per_sample"], row["nats_per_sample_ci95"]) for row in report.comparison(results)
  )
  np.testing.assert_allclose(half([result, result]), half([result]))
  both = report.drawn([result, result]), report.drawn([result])
  assert both[0] == both[1]


def test_methods_move_what_they_say():
  config = presets.load("synthetic", [*SETTINGS, "network.dilations=(1,2)"])
  params = wavenet.init(jax.random.key(0), model.network(config))
  made = arms.baselines(config, params)
  moving = {
    name: {module for module, sigma in make(STILL).spec.sigma.items() if sigma > 0}
    for name, make in made.items()
  }
  assert moving == {"fine_tuning": {"network"}, "head": {"head"}, "biases": {"biases"}}
  for name, want in (
    ("biases", ["layer_0/gate/bias", "layer_1/gate/bias"]),
    ("head", ["head_0/bias", "head_0/kernel", "head_1/bias", "head_1/kernel"]),
  ):
    flat = jax.tree_util.tree_flatten_with_path(made[name](STILL).labels)[0]
    parts = lambda path: "/".join(str(key.key) for key in path)
    assert [parts(path) for path, x in flat if x == name] == want
