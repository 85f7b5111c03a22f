"""Arguments of the training functions, valid ones and those that are refused before any work."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

import shrinkmeta as sm

LABELS = {"w": "w"}
PARAMS = {"w": jnp.zeros(2)}
LEARNER = sm.sigma_imaml(
  sm.gaussian(lambda theta, x: x @ theta["w"]), LABELS, inner=sm.Inner(optax.sgd(0.1), 1)
)


def source(first, count):
  del first
  return sm.Task(*[sm.Batch(jnp.ones((count, 4, 2)), jnp.ones((count, 4)))] * 2)


def untouched(first, count):
  raise AssertionError("work began")


def start():
  return LEARNER.init(PARAMS)


def fit(**keywords):
  arguments = {
    "learner": LEARNER,
    "state": start(),
    "tasks": untouched,
    "steps": 1,
    "meta_batch": 2,
  }
  return sm.fit(**arguments | keywords)


WRONG = [
  (
    "learner",
    sm.sigma_imaml,
    "learner must be a shrinkmeta.MetaLearner; got the function sigma_imaml. Build one",
  ),
  ("learner", None, "learner must be a shrinkmeta.MetaLearner.*; got"),
  ("learner", optax.sgd(0.1), "learner must be a shrinkmeta.MetaLearner.*; got"),
  (
    "state",
    PARAMS,
    r"state must be a shrinkmeta.MetaState; got .* Make one: learner.init\(params\)",
  ),
  ("state", None, "state must be a shrinkmeta.MetaState"),
  ("tasks", 3, r"tasks must be a function, \(first, count\) -> .*; got"),
  ("tasks", [1, 2], r"tasks\[0\] must be a shrinkmeta.Task, as tasks\[0\] is; got"),
  ("tasks", [source(0, 2).train], "got Batches. Split them: tasks=shrinkmeta.source"),
  ("tasks", [], "tasks is an empty list"),
  ("steps", 10.0, "steps must be an integer of at least 0; got"),
  ("steps", "10", "steps must be an integer"),
  ("steps", None, "steps must be an integer"),
  ("steps", True, "steps must be an integer of at least 0; got"),
  ("steps", -1, "steps must be at least 0; got -1"),
  ("meta_batch", 2.0, "meta_batch must be an integer of at least 1; got"),
  ("meta_batch", 0, "meta_batch must be at least 1; got 0"),
  ("micro_batches", 2.0, "micro_batches must be an integer"),
  ("micro_batches", 0, "micro_batches must be at least 1; got 0"),
  ("evaluate_every", 1.5, "evaluate_every must be an integer"),
  ("key", 0, "key must be a key of random numbers, or None; got 0. Make one"),
  ("key", np.arange(3), r"key must be a key of random numbers.*; got an array int64\[3\]"),
  (
    "key",
    jax.random.split(jax.random.key(0)),
    r"key must be one key .*; got an array key<fry>\[2\]",
  ),
  ("callbacks", lambda step, record: None, "callbacks must be a sequence.*; got"),
  ("callbacks", [lambda step, record: None], r"callbacks\[0\] must be a shrinkmeta.Callback"),
  ("callbacks", [sm.recorder], r"callbacks\[0\] must be a shrinkmeta.Callback"),
  ("callbacks", sm.recorder([]), "callbacks must be .*; got one Callback: put it into a list"),
  ("callbacks", None, "callbacks must be a sequence"),
  (
    "checkpoints",
    sm.Checkpoints,
    "checkpoints must be a shrinkmeta.Checkpoints.*; got the class Checkpoints",
  ),
  (
    "checkpoints",
    "folder",
    "checkpoints must be a shrinkmeta.Checkpoints.folder., or None; got 'folder'",
  ),
  ("rules", [("w", None)], "rules must be a dict"),
  ("rules", {"w": "model"}, r"rules\['w'\] must be a jax.sharding.PartitionSpec; got"),
  ("stall_seconds", "60", "stall_seconds must be a number; got '60'"),
  ("stall_seconds", 0.0, "stall_seconds must be positive"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_fit_refuses_what_is_wrong_before_any_work(name, value, message):
  with pytest.raises((TypeError, ValueError), match=message):
    fit(**{name: value})


def test_fit_refuses_a_wrong_evaluation(tmp_path):
  pair = {"evaluate": "nll", "evaluate_every": 1}
  with pytest.raises(TypeError, match="evaluate must be a function, state -> .*; got"):
    fit(**pair)
  kept = sm.Checkpoints(tmp_path)
  with pytest.raises(TypeError, match="best must be a name that evaluate returns.*; got"):
    fit(evaluate=lambda state: {}, evaluate_every=1, best=["nll"], checkpoints=kept)
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    (1.0, r"evaluate\(state\) must be a dict {name: number}; got"),
    ({"a": jnp.zeros(2)}, r"evaluate\(state\)\['a'\] must be a number; got Array"),
    ({"a": "1.0"}, r"evaluate\(state\)\['a'\] must be a number; got '1.0'"),
    ({"a": None}, r"evaluate\(state\)\['a'\] must be a number; got None"),
  ],
)
def test_what_evaluate_returns_is_checked(returned, message):
  with pytest.raises(TypeError, match=message):
    fit(tasks=source, evaluate=lambda state: returned, evaluate_every=1)


def test_what_the_source_returns_is_checked():
  batch = source(0, 2).train
  with pytest.raises(TypeError, match=r"tasks\(0, 2\) must be a shrinkmeta.Task.*; got"):
    fit(tasks=lambda first, count: batch)


def test_numpy_and_jax_scalars_are_numbers(tmp_path):
  records = []
  state = fit(
    tasks=source,
    steps=np.int64(3),
    meta_batch=np.int32(4),
    micro_batches=np.uint8(2),
    evaluate=lambda state: {"a": np.float32(0.5), "b": jnp.asarray(2), "c": np.array(3.0)},
    evaluate_every=jnp.asarray(3),
    best="a",
    callbacks=(sm.recorder(records),),
    checkpoints=sm.Checkpoints(
      tmp_path, every=np.int64(2), keep=np.int8(1), settings={"rate": np.float32(0.5)}
    ),
    stall_seconds=np.float32(600.0),
  )
  assert int(state.step) == 3
  assert [records[2][f"eval/{name}"] for name in "abc"] == [0.5, 2.0, 3.0]
  again = sm.Checkpoints(tmp_path, settings={"rate": 0.5})
  restored = sm.restore(again, LEARNER, start(), np.int64(3))
  assert restored is not None and int(restored.step) == 3


@pytest.mark.parametrize(
  ("keywords", "error", "message"),
  [
    ({"folder": None}, TypeError, "Checkpoints.folder must be a path .*; got"),
    ({"folder": ["x"]}, TypeError, "Checkpoints.folder must be a path .*; got"),
    ({"every": 10.0}, TypeError, "Checkpoints.every must be an integer of at least 1; got"),
    ({"every": True}, TypeError, "Checkpoints.every must be an integer of at least 1; got"),
    ({"keep": None}, TypeError, "Checkpoints.keep must be an integer of at least 1; got"),
    ({"asynchronous": "no"}, TypeError, "Checkpoints.asynchronous must be True or False; got"),
    ({"settings": [1]}, TypeError, "Checkpoints.settings must be a dict of plain data; got"),
    ({"settings": {"f": len}}, TypeError, "Checkpoints.settings must be plain data"),
  ],
)
def test_checkpoints_refuse_what_is_wrong(keywords, error, message):
  with pytest.raises(error, match=message):
    sm.Checkpoints(**{"folder": "x"} | keywords)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      (sm.Checkpoints, LEARNER, None),
      "checkpoints must be a shrinkmeta.Checkpoints.*; got the class Checkpoints",
    ),
    ((sm.Checkpoints("x"), sm.maml, None), "learner must be a shrinkmeta.MetaLearner.*; got"),
    ((sm.Checkpoints("x"), LEARNER, PARAMS), "state must be a shrinkmeta.MetaState"),
    ((sm.Checkpoints("x"), LEARNER, start(), 1.0), "step must be an integer of at least 0; got"),
    (
      (sm.Checkpoints("x"), LEARNER, start(), "last"),
      'step must be an integer, "best" or None; got',
    ),
  ],
)
def test_restore_refuses_what_is_wrong(arguments, message):
  with pytest.raises((TypeError, ValueError), match=message):
    sm.restore(*arguments)


def test_callbacks_refuse_what_is_wrong():
  with pytest.raises(TypeError, match="records must be a list to append to; got .*list"):
    sm.recorder(list)
  with pytest.raises(TypeError, match="name must be a string; got"):
    sm.progress_bar(7)
  for make, name in (
    (sm.json_lines, "path"),
    (sm.read_json_lines, "path"),
    (sm.tensorboard, "folder"),
  ):
    for wrong in (None, 7, ["x"], pathlib.Path, b"x"):
      with pytest.raises(TypeError, match=f"{name} must be a path"):
        make(wrong)


@pytest.fixture
def empty(tmp_path, monkeypatch):
  """An empty current folder beside an empty home."""
  for name in ("here", "home"):
    (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  yield tmp_path / "here", tmp_path / "home"
  assert os.listdir(tmp_path / "here") == []


URLS = ["gs://bucket/run", "s3://bucket/run", pathlib.Path("gs://bucket/run"), "file:///tmp/run"]


@pytest.mark.parametrize("url", [*URLS, epath.Path("gs://bucket/run")])
def test_a_bucket_is_refused_before_any_work(empty, url):
  refused = "must be a path of a mounted file system; got the URL"
  checkpoints = sm.Checkpoints(url)
  with pytest.raises(ValueError, match=f"Checkpoints.folder {refused}"):
    fit(checkpoints=checkpoints)
  with pytest.raises(ValueError, match=f"Checkpoints.folder {refused}"):
    sm.restore(checkpoints, LEARNER, start())
  with pytest.raises(ValueError, match=f"path {refused}"):
    fit(callbacks=[sm.json_lines(url)])
  with pytest.raises(ValueError, match=f"path {refused}"):
    sm.read_json_lines(url)


def test_tensorboard_passes_buckets_on(empty, monkeypatch):
  folders = []
  writer = lambda folder, purge_step: folders.append(folder)
  monkeypatch.setattr("tensorboardX.SummaryWriter", writer)
  sm.tensorboard("gs://bucket/run").begin(0, 1)
  with pytest.raises(ValueError, match="folder must be a path of a mounted .* 'hdfs://name/run'"):
    sm.tensorboard("hdfs://name/run").begin(0, 1)
  assert folders == ["gs://bucket/run"]


def test_the_home_is_expanded(empty):
  _, home = empty
  log, records = "~/run/log.jsonl", []
  checkpoints = sm.Checkpoints("~/run", every=1)
  fit(
    tasks=source,
    callbacks=[sm.recorder(records), sm.json_lines(log), sm.tensorboard("~/run/events")],
    checkpoints=checkpoints,
  )
  assert checkpoints.folder == home / "run"
  assert sorted(os.listdir(home / "run")) == ["1", "events", "log.jsonl"]
  assert sm.read_json_lines(log) == records
  assert sm.restore(checkpoints, LEARNER, start()) is not None
  with pytest.raises(ValueError, match="Checkpoints.folder is '~nobody_of_that_name/run'"):
    sm.Checkpoints("~nobody_of_that_name/run")


def test_paths_of_any_kind(empty):
  _, home = empty

  class Named:
    def __fspath__(self):
      return str(home / "named")

  for path in (str(home / "a"), home / "b", Named(), epath.Path(home / "c")):
    callback = sm.json_lines(path)
    callback.begin(0, 1)
    callback.record(0, {"loss": 0.5})
    callback.end()
    assert sm.read_json_lines(path) == [{"step": 0, "loss": 0.5}]
    assert sm.Checkpoints(path).folder == pathlib.Path(path)


def test_a_log_with_a_byte_order_mark_is_read(tmp_path):
  path = tmp_path / "log.jsonl"
  path.write_text('\ufeff{"step": 0, "loss": 0.5}\n', encoding="utf-8")
  assert sm.read_json_lines(path) == [{"step": 0, "loss": 0.5}]


def test_settings_may_hold_paths_and_numbers_of_numpy(tmp_path):
  settings = {"data": tmp_path, "rate": np.float32(0.5), "seeds": (np.int64(1), 2)}
  assert sm.Checkpoints(tmp_path, settings=settings).settings is settings
  with pytest.raises(TypeError, match="plain data"):
    sm.Checkpoints(tmp_path, settings={"network": object()})
