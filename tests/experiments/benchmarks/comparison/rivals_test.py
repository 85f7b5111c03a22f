"""The command lines of other libraries and their output; no other library runs here."""

import sys

import pytest

from experiments.benchmarks.comparison import pairs, rivals
from experiments.benchmarks.worker import Config


@pytest.fixture
def peers(tmp_path):
  for name in ("bench_torch.py", "bench_jax.py"):
    (tmp_path / name).touch()
  return str(tmp_path)


def test_commands(peers):
  config = Config("w1", "sigma_imaml", repetitions=3, max_seconds=9.0)
  line = rivals.command("torch-loop", config, peers, sys.executable)
  assert line[:2] == [sys.executable, f"{peers}/bench_torch.py"]
  text = " ".join(line[2:])
  assert text == (
    "--lib loop --workload w1 --alg imaml --steps 16 --tasks 16 --reps 3 --max-seconds 9"
  )
  text = " ".join(rivals.command("jax", Config("w5", "adapt"), peers, sys.executable))
  assert "--workload w1 --alg reptile --steps 5 --tasks 256" in text
  assert text.endswith("--conv eigen --pool max4 --inner scan --batching shard")
  text = " ".join(rivals.command("jax", Config("w3", "maml"), peers, sys.executable))
  assert "--conv" not in text and text.endswith("--inner scan --batching vmap")
  text = " ".join(
    rivals.command("torch-func", Config("w2", "imaml", steps=7), peers, sys.executable)
  )
  assert "--steps 7" in text and text.endswith("--chunk 1")


@pytest.mark.parametrize(
  "name, config, says",
  [
    ("protonet", Config(), "no rival; choose one of learn2learn"),
    ("higher", Config("w1", "imaml"), "higher has no imaml, only maml"),
    ("jaxopt", Config("w1", "maml"), "only imaml"),
    ("torchopt", Config("w1", "maml", tiny=True), "--tiny"),
  ],
)
def test_what_a_rival_cannot_do(peers, name, config, says):
  with pytest.raises(ValueError, match=says):
    rivals.command(name, config, peers, sys.executable)


def test_missing_folder_and_interpreter(peers, tmp_path):
  with pytest.raises(ValueError, match="--peers must be the folder"):
    rivals.command("higher", Config(), str(tmp_path / "none"), sys.executable)
  with pytest.raises(ValueError, match="--rival_python must be a Python with higher"):
    rivals.command("higher", Config(), peers, str(tmp_path / "python"))


def test_a_printed_line_is_read():
  line = (
    '{"lib": "higher", "seconds_per_step": 2.5, "best": 2.25, "reps": 4, "contended": false, '
    '"compile_s": 0.0, "peak_rss_mb": 500, "own_cores": 1.9, "other_cores": 0.0, "gflops": 40.0}'
  )
  record = rivals.to_record(rivals.parse(f"a warning\n{line}\n{{not json\n"))
  assert record["library"] == "higher" and record["seconds"]["median"] == 2.5
  assert record["peak_rss_bytes"] == 500 * 2**20 and record["raw"]["best"] == 2.25
  with pytest.raises(ValueError, match="printed no JSON line"):
    rivals.parse("Traceback")
  with pytest.raises(ValueError, match="memory guard"):
    rivals.parse('{"lib": "loop", "error": "memory guard"}')


def test_a_rival_that_dies_is_quoted():
  with pytest.raises(RuntimeError, match="no torch here"):
    rivals.run([sys.executable, "-c", "import sys; sys.exit('no torch here')"])


def test_settings_against_each_other():
  config = pairs.changed(Config(), ["batching=4", "curvature=gauss_newton", "tiny=true"])
  assert (config.batching, config.curvature, config.tiny) == (4, "gauss_newton", True)
  assert pairs.changed(Config(), ["max_seconds=0.5"]).max_seconds == 0.5
  for wrong, message in (
    ("colour=red", "FIELD=VALUE"),
    ("tiny=yes", "tiny=yes wants true or false"),
    ("max_seconds=long", "max_seconds=long wants a number"),
    ("steps=long", "steps=long wants a number"),
    ("devices=long", "devices=long wants a number"),
    ("moving=al", "moving is one of few, all; got 'al'"),
    ("curvature=hesian", "curvature is one of hessian, gauss_newton; got 'hesian'"),
  ):
    with pytest.raises(ValueError, match=message):
      pairs.changed(Config(), [wrong])


def test_ratio_of_paired_medians(monkeypatch):
  def record(library, seconds):
    spread = {"median": seconds, "low": seconds, "high": seconds, "repeats": 1}
    return {"library": library, "seconds": spread, "peak_rss_bytes": 2**20, "contended": False}

  ours, theirs = iter([1.0, 2.0, 3.0]), iter([2.0, 8.0, 9.0])
  monkeypatch.setattr(pairs, "spawn", lambda config: record("shrinkmeta", next(ours)))
  records = []
  table = pairs.run(Config(), 3, lambda: record("other", next(theirs)), records.append)
  assert [r["side"] for r in records[:6]] == ["ours", "other"] * 3
  assert records[6]["ratio"] == {"median": 3.0, "low": 2.0, "high": 4.0, "repeats": 3}
  assert "seconds, other / ours: 3 [2, 4]" in table


def test_what_was_measured_is_kept_where_the_next_fails(monkeypatch):
  monkeypatch.setattr(pairs, "spawn", lambda config: {"seconds": 1.0})
  records = []
  with pytest.raises(StopIteration):
    pairs.run(Config(), 2, lambda: next(iter(())), records.append)
  assert [r["side"] for r in records] == ["ours"]


@pytest.mark.parametrize(
  "flags, message",
  (
    (["stray"], "Unexpected arguments"),
    (["--rival=protonet"], "is no rival; choose one of"),
    (["--study=warm", "--against=steps=3"], "A study is run once, by itself"),
  ),
)
def test_a_bad_flag_is_a_usage_error(command, flags, message):
  done = command("benchmarks", *flags)
  assert done.returncode and message in done.stdout + done.stderr
