"""The main job, small: it runs from end to end, repeats itself, and says what is wrong."""

import csv
import pathlib

import numpy as np
import pytest
from absl import app

from experiments import configs, glyphs, results

ALGORITHMS = ("sigma_imaml", "fomaml")


def run(out: pathlib.Path, algorithms=ALGORITHMS, seeds=(0,), dataset="glyphs", **keywords) -> str:
  config = configs.load("smoke")
  return glyphs.run(algorithms, seeds, config, dataset, keywords.get("data_dir"), "test", out)


@pytest.mark.slow
def test_end_to_end_and_again(tmp_path):
  tables = run(tmp_path / "a", seeds=(0, 1))
  for text in ("5-way 1-shot", "batch (transductive)", "sigma_imaml", "fomaml", "conv_3", "head"):
    assert text in tables
  for name in ("results.csv", "adaptation.png", "sigma.png", "sigma_history.png"):
    assert (tmp_path / "a" / name).stat().st_size > 0
  assert list((tmp_path / "a" / "tensorboard").glob("*/events*"))
  config, curves = results.read_json(tmp_path / "a" / "results.json")
  assert config["dataset"] == "glyphs" and config["meta_steps"] == 3
  assert [(c.algorithm, c.seed) for c in curves] == [(a, s) for s in (0, 1) for a in ALGORITHMS]
  sigma = [c.history["sigma/head"] for c in curves if c.algorithm == "sigma_imaml"]
  assert all(len(s) == 3 and np.isfinite(s).all() for s in sigma) and sigma[0] != sigma[1]
  with (tmp_path / "a" / "results.csv").open() as file:
    assert len(list(csv.reader(file))) == 1 + 4 * 4 * 3  # curves, episodes, steps

  run(tmp_path / "b", algorithms=("sigma_imaml",))
  again = results.read_json(tmp_path / "b" / "results.json")[1][0]
  np.testing.assert_array_equal(again.nll, curves[0].nll)
  assert again.sigma == curves[0].sigma


def test_what_cannot_be_run_is_refused_before_anything_is_read(tmp_path):
  with pytest.raises(app.UsageError, match="protonet"):
    run(tmp_path / "x", algorithms=("protonet",))
  assert not (tmp_path / "x").exists()


def test_omniglot_without_a_folder(tmp_path, monkeypatch):
  monkeypatch.delenv("SHRINKMETA_DATA", raising=False)
  with pytest.raises(app.UsageError, match="--data_dir"):
    run(tmp_path, dataset="omniglot")
  with pytest.raises(FileNotFoundError, match="images_background.zip"):
    run(tmp_path, dataset="omniglot", data_dir=str(tmp_path))


def test_train_and_test_systems_are_disjoint():
  for split in ("test", "validation"):
    data = glyphs.load_data("glyphs", None, split, 20)
    assert not set(data.train.systems) & set(data.test.systems)
    assert len(data.train.systems) >= 15 and len(data.test.systems) >= 4
