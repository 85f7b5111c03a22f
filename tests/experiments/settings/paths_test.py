"""Paths from users."""

import pathlib

import pytest
from absl import flags

from experiments.datasets.files import cache
from experiments.settings import paths

URLS = ("gs://bucket/run", "s3://bucket", "http://host/x", "hdfs://x", "gs:/bucket")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))


def test_a_tilde_is_the_home(tmp_path):
  assert paths.local("--out", "~/runs") == tmp_path / "runs"
  assert paths.local("--out", "~") == tmp_path
  for text in ("runs/x", "/runs/~x", "C:/runs", "run:1"):
    assert paths.local("--out", text) == pathlib.Path(text)


@pytest.mark.parametrize("url", URLS)
def test_urls_are_refused(url):
  with pytest.raises(ValueError, match=f"^--out is a path of a mounted file system; .* '{url}'"):
    paths.local("--out", url)


def test_the_home_of_an_unknown_user():
  with pytest.raises(ValueError, match="^--out is '~no-such-user/x': .*Write the folder out"):
    paths.local("--out", "~no-such-user/x")


def test_flags_are_read_so(tmp_path):
  values = flags.FlagValues()
  flags.DEFINE(paths.PathParser(), "out", None, "Where.", flag_values=values)
  values(["program"])
  assert values.out is None
  values(["program", "--out=~/runs"])
  assert values.out == str(tmp_path / "runs")
  with pytest.raises(flags.IllegalFlagValueError, match="--out=gs://b: .*Mount the bucket"):
    values(["program", "--out=gs://b"])


def test_data_and_caches_in_the_home(monkeypatch, tmp_path):
  assert cache.data_folder("omniglot", "~/o") == tmp_path / "o"
  monkeypatch.setenv("SHRINKMETA_DATA", "~/data")
  assert cache.data_folder("omniglot", None) == tmp_path / "data" / "omniglot"
  write = lambda path, value: path.write_text(value)
  for folder in ("~/cache", None):
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    read = pathlib.Path.read_text
    assert cache.cached(folder, "x", lambda: "made", read, write) == "made"
  assert (tmp_path / "cache" / "x").is_file()
  assert (tmp_path / "cache" / "shrinkmeta" / "x").is_file()
