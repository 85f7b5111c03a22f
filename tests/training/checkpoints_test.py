"""Checkpoints: round trips, damaged files, other models; no readable checkpoint is lost."""

import errno
import json
import os
import pathlib
import shutil
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import shrinkmeta as sm
from shrinkmeta.training import checkpoint_format, checkpoints

LIKELIHOOD = sm.gaussian(lambda p, x: x @ p["slope"] + p["level"], 1.0)
PARAMS = {"slope": jnp.zeros(300), "level": jnp.zeros([])}


def make_learner(**keywords):
  keywords = {"labels": sm.by_leaf(PARAMS), "make": sm.sigma_imaml} | keywords
  labels, make = keywords.pop("labels"), keywords.pop("make")
  return make(LIKELIHOOD, labels, inner=sm.Inner(optax.sgd(0.1), 2), **keywords)


def state_at(learner, step):
  """A state whose entries all differ, and depend on the step."""
  keys = iter(jax.random.split(jax.random.key(step), 100))
  draw = lambda x: (
    jax.random.normal(next(keys), x.shape, x.dtype) if x.dtype == jnp.float32 else x + step
  )
  return jax.tree.map(draw, learner.init(PARAMS))._replace(step=jnp.asarray(step, jnp.int32))


def write(folder, learner, steps, **keywords):
  with checkpoints.opened(sm.Checkpoints(folder, **keywords), learner) as store:
    for step in steps:
      store.save(state_at(learner, step))


def read(folder, learner, params=PARAMS):
  with checkpoints.opened(sm.Checkpoints(folder), learner) as store:
    return store.restore(learner.init(params))


def kept(folder):
  return sorted(path.name for path in pathlib.Path(folder).iterdir())


def test_the_last_checkpoints_are_kept_and_the_newest_is_restored(tmp_path):
  learner = make_learner()
  write(tmp_path / "deep" / "run", learner, range(1, 6), keep=2)
  assert kept(tmp_path / "deep" / "run") == ["4", "5"]
  chex.assert_trees_all_equal(read(tmp_path / "deep" / "run", learner), state_at(learner, 5))


def test_an_empty_folder_restores_nothing(tmp_path):
  assert read(tmp_path / "new", make_learner()) is None


def test_the_best_is_kept_beside_the_last(tmp_path):
  learner = make_learner()
  with checkpoints.opened(sm.Checkpoints(tmp_path, keep=1), learner) as store:
    assert store.best() is None
    for step, value in ((1, 3.0), (2, 1.5), (3, float("nan")), (4, 2.0), (5, None)):
      store.save(state_at(learner, step), value)
  assert kept(tmp_path) == ["2", "5"]
  with checkpoints.opened(sm.Checkpoints(tmp_path, keep=1), learner) as store:
    assert store.best() == (2, 1.5)


def test_the_best_is_known_before_it_is_on_disk(tmp_path, monkeypatch):
  """Otherwise two processes could look at different moments, and one would save and one not."""
  manager = orbax.checkpoint.CheckpointManager
  monkeypatch.setattr(manager, "metrics", lambda self, step: None)  # as before the save is finished
  with checkpoints.opened(sm.Checkpoints(tmp_path), make_learner()) as store:
    store.save(state_at(make_learner(), 1), 1.0)
    assert store.best() == (1, 1.0)
    store.save(state_at(make_learner(), 2), 2.0)
    assert store.best() == (1, 1.0)


@pytest.mark.parametrize(
  "error",
  (
    OSError(errno.EACCES, "no permission"),
    OSError(errno.ESTALE, "a server away"),
    ValueError("PERMISSION_DENIED: Error opening local file"),
  ),
)
def test_a_temporary_error_leaves_the_checkpoint_as_it_is(tmp_path, monkeypatch, error):
  learner = make_learner()
  write(tmp_path, learner, (1, 2))
  read_one = checkpoints._read

  def fails(path, *rest):
    if path.name == "2":
      raise error
    return read_one(path, *rest)

  monkeypatch.setattr(checkpoints, "_read", fails)
  with pytest.raises(OSError, match="cannot be read now: .*it was left as it is"):
    read(tmp_path, learner)
  assert kept(tmp_path) == ["1", "2"]
  monkeypatch.undo()
  chex.assert_trees_all_equal(read(tmp_path, learner), state_at(learner, 2))


def test_random_keys_in_the_state(tmp_path):
  learner = make_learner(phi_optimizer=optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3))))
  state = learner.init(PARAMS)._replace(step=jnp.asarray(1, jnp.int32))
  with checkpoints.opened(sm.Checkpoints(tmp_path), learner) as store:
    store.save(state)
    store.finish()
    restored = store.restore(state)
  assert restored is not None
  key_data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  chex.assert_trees_all_equal(jax.tree.map(key_data, restored), jax.tree.map(key_data, state))


def test_complex_constants_have_a_fingerprint():
  first = checkpoint_format.fingerprints({"a": jnp.array([1.0 + 2.0j, 3.0j])})
  for other in ([2.0 + 1.0j, 3.0j], [1.0 + 2.0j, 4.0j], [3.0j, 1.0 + 2.0j]):
    assert checkpoint_format.fingerprints({"a": jnp.array(other)}) != first


def test_leaves_without_an_entry_are_restored(tmp_path):
  """Orbax refuses to write them."""
  labels = {"slope": "slope", "level": "level", "none": "none"}
  learner = make_learner(labels=labels)
  state = learner.init(PARAMS | {"none": jnp.zeros((0, 3))})._replace(step=jnp.int32(4))
  with checkpoints.opened(sm.Checkpoints(tmp_path), learner) as store:
    store.save(state)
  with checkpoints.opened(sm.Checkpoints(tmp_path), learner) as store:
    chex.assert_trees_all_equal(store.restore(learner.init(state.phi)), state)


def test_every_bit_counts_in_a_fingerprint():
  tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.asarray([True, False])}
  first = jax.jit(checkpoint_format.fingerprints)(tree)
  bits = np.asarray(tree["a"]).view(np.uint32)
  for entry in range(6):
    for bit in range(32):
      changed = bits.copy().reshape(-1)
      changed[entry] ^= np.uint32(1) << np.uint32(bit)
      other = tree | {"a": jnp.asarray(changed.reshape(2, 3).view(np.float32))}
      assert checkpoint_format.fingerprints(other)["a"] != first["a"]
  swapped = tree | {"a": tree["a"].at[0, 0].set(1.0).at[0, 1].set(0.0), "b": ~tree["b"]}
  second = checkpoint_format.fingerprints(swapped)
  assert second["a"] != first["a"] and second["b"] != first["b"]


def files(folder):
  return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_the_previous_checkpoint_is_used_if_a_file_is_damaged(tmp_path, damage):
  """Damage each file of the newest checkpoint. If it does not matter, the newest may be read."""
  learner = make_learner()
  write(tmp_path / "good", learner, (1, 2))
  count = len(files(tmp_path / "good" / "2"))
  fallbacks = 0
  for i in range(count):
    folder = tmp_path / str(i)
    shutil.copytree(tmp_path / "good", folder)
    path = files(folder / "2")[i]
    content = path.read_bytes()
    if damage == "remove":
      path.unlink()
    elif damage == "truncate":
      path.write_bytes(content[: len(content) // 2])
    else:
      middle = len(content) // 2
      path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    restored = read(folder, learner)
    assert restored is not None
    step = int(restored.step)
    chex.assert_trees_all_equal(restored, state_at(learner, step))
    if step == 1:
      fallbacks += 1
      assert kept(folder) == ["1", "2.damaged"]
      write(folder, learner, (2, 3))  # the step can be written again
      assert kept(folder) == ["1", "2", "2.damaged", "3"]
  assert fallbacks >= 3


def test_no_readable_checkpoint_is_an_error_and_not_a_new_start(tmp_path):
  learner = make_learner()
  write(tmp_path, learner, (1, 2))
  before = [str(path) for path in files(tmp_path)]
  for step in (1, 2):
    shutil.rmtree(tmp_path / str(step) / "state")
  with pytest.raises(
    OSError, match=r"No checkpoint .* can be read: step 2.*step 1.*Copy a readable"
  ):
    read(tmp_path, learner)
  assert {str(path) for path in files(tmp_path)} == {p for p in before if "/state/" not in p}


def test_other_models_labels_algorithms_and_formats_are_named(tmp_path):
  learner = make_learner()
  write(tmp_path, learner, (1,))
  wider = PARAMS | {"slope": jnp.zeros(301)}
  with pytest.raises(ValueError, match=r"array .*phi/slope: float32\[300\] in it.*301\] here"):
    read(tmp_path, learner, wider)
  with pytest.raises(ValueError, match=r"module level: 'level' in it, 'all' here"):
    read(tmp_path, make_learner(labels={"slope": "all", "level": "all"}))
  with pytest.raises(ValueError, match=r"by the algorithm \['learned', 'predictive', 'implicit'\]"):
    read(tmp_path, make_learner(make=sm.maml))
  with pytest.raises(ValueError, match=r"array opt_state/phi/0/count: int32\[\] in it, absent"):
    read(tmp_path, make_learner(phi_optimizer=optax.sgd(0.1, momentum=0.9)))
  about = tmp_path / "1" / "about" / "metadata"
  content = json.loads(about.read_text()) | {"format": checkpoint_format.FORMAT + 1}
  content["digest"] = checkpoint_format.digest({k: v for k, v in content.items() if k != "digest"})
  about.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"has format 2, written by shrinkmeta .* reads up to 1"):
    read(tmp_path, learner)
  assert kept(tmp_path) == ["1"]


def test_settings_that_the_state_does_not_show_must_agree(tmp_path):
  learner, state = make_learner(), make_learner().init(PARAMS)
  write(tmp_path, learner, (1,), settings={"rate": 0.1, "sizes": (2, 3)})
  same = sm.Checkpoints(tmp_path, settings={"sizes": (2, 3), "rate": 0.1})
  with checkpoints.opened(same, learner) as store:
    chex.assert_trees_all_equal(store.restore(state), state_at(learner, 1))
  other = sm.Checkpoints(tmp_path, settings={"rate": 0.2, "sizes": (2, 3)})
  message = r"of another run: setting rate: 0.1 in it, 0.2 here. Continue with the settings"
  with checkpoints.opened(other, learner) as store, pytest.raises(ValueError, match=message):
    store.restore(state)


def test_a_setting_that_is_nan_agrees_with_nan_only(tmp_path):
  learner, state, nan = make_learner(), make_learner().init(PARAMS), float("nan")
  settings = {"clip": nan, "grid": [1, {"top": nan, "end": float("inf")}]}
  write(tmp_path, learner, (1,), settings=settings)
  same = sm.Checkpoints(tmp_path, settings={"clip": np.float32("nan"), "grid": settings["grid"]})
  chex.assert_trees_all_equal(sm.restore(same, learner, state), state_at(learner, 1))
  for other in (0.0, "NaN", None, float("inf"), ["NaN"]):
    with pytest.raises(ValueError, match="setting clip: nan in it, .* here"):
      sm.restore(sm.Checkpoints(tmp_path, settings=settings | {"clip": other}), learner, state)
  assert checkpoint_format.equal(1, 1.0) and not checkpoint_format.equal([nan, 1], [nan, 2])


def test_another_restriction_is_another_run(tmp_path):
  """A run by maximum likelihood must not go on as one by REML."""
  evidence = lambda *restricted: make_learner(make=sm.empirical_bayes, restricted=restricted)
  write(tmp_path, evidence("level", "slope"), (1,))
  restored = read(tmp_path, evidence("slope", "level"))  # the order has no meaning
  chex.assert_trees_all_equal(restored, state_at(evidence(), 1))
  message = r"restricted: \['level', 'slope'\] in it, \[{}\] here"
  for restricted, here in (((), ""), (("slope",), "'slope'")):
    with pytest.raises(ValueError, match=message.format(here)):
      read(tmp_path, evidence(*restricted))


def test_settings_are_checked():
  with pytest.raises(ValueError, match=r"Checkpoints.keep must be at least 1; got 0"):
    sm.Checkpoints("x", keep=0)
  with pytest.raises(TypeError, match=r"Checkpoints.every must be .*; got .*2\.5"):
    sm.Checkpoints("x", every=2.5)  # pyright: ignore[reportArgumentType]


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(OSError, match=r"cannot be written to.*Name another folder"):
    write(tmp_path / "file" / "run", make_learner(), (1,))


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 200 kB."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True
  )
  if mounted.returncode:
    pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.decode().strip()}")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_the_last_good_checkpoint_stays(small_disk):
  learner = make_learner()
  write(small_disk, learner, (1,))
  (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8_192))
  with pytest.raises(OSError, match=r"of step 2 could not be written to .*continues from step 1"):
    write(small_disk, learner, (2,))
  (small_disk / "ballast").unlink()
  chex.assert_trees_all_equal(read(small_disk, learner), state_at(learner, 1))
  write(small_disk, learner, (2,))
  chex.assert_trees_all_equal(read(small_disk, learner), state_at(learner, 2))


def test_the_error_names_the_step_whose_save_failed(tmp_path, monkeypatch):
  """An asynchronous save fails later, when the next step is being saved."""
  learner, wait = make_learner(), orbax.checkpoint.CheckpointManager.wait_until_finished
  with checkpoints.opened(sm.Checkpoints(tmp_path), learner) as store:
    store.save(state_at(learner, 20))

    def fails(self):
      wait(self)
      monkeypatch.undo()
      raise OSError("the disk is full.")

    monkeypatch.setattr(orbax.checkpoint.CheckpointManager, "wait_until_finished", fails)
    with pytest.raises(OSError, match="of step 20 could not be written to .* the disk is full"):
      store.save(state_at(learner, 30))


def test_the_stored_format_keeps_its_keys(tmp_path):
  """Checkpoints written before can be read as long as these names stay."""
  learner = make_learner()
  write(tmp_path, learner, (1,), settings={"rate": 0.1})
  content = json.loads((tmp_path / "1" / "about" / "metadata").read_text())
  assert set(content) == {
    *("format", "row", "sigma", "restricted", "fit", "settings", "modules", "arrays"),
    *("fingerprints", "versions", "constants", "digest", "devices", "run"),
  }
  assert content["row"] == ["learned", "predictive", "implicit"]


def test_a_read_only_disk(small_disk):
  learner = make_learner()
  write(small_disk, learner, (1,))
  subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
  with pytest.raises(OSError, match=r"cannot be written to: .*[Rr]ead-only.*Name another folder"):
    read(small_disk, learner)
  assert "1" in os.listdir(small_disk)


def test_restore_gives_any_state_that_was_kept(tmp_path):
  learner = make_learner()
  with checkpoints.opened(sm.Checkpoints(tmp_path, keep=1), learner) as store:
    for step, value in ((1, 3.0), (2, 1.5), (5, 2.0)):
      store.save(state_at(learner, step), value)
  before = kept(tmp_path)
  kept_there, like = sm.Checkpoints(tmp_path), learner.init(PARAMS)
  for step, want in ((None, 5), ("best", 2), (2, 2), (5, 5)):
    chex.assert_trees_all_equal(
      sm.restore(kept_there, learner, like, step), state_at(learner, want)
    )
  on_host = jax.device_get(like)
  chex.assert_trees_all_equal(sm.restore(kept_there, learner, on_host), state_at(learner, 5))
  with pytest.raises(ValueError, match=r"no state of step 1; its steps are \[2, 5\]"):
    sm.restore(kept_there, learner, like, 1)
  assert kept(tmp_path) == before
  with pytest.raises(ValueError, match="another run: .*sigma of level"):
    sm.restore(kept_there, make_learner(init_sigma={"slope": 1.0, "level": 0.0}), like)


def test_an_older_description_is_compared_without_the_newer_fields():
  learner = make_learner()
  wanted = checkpoint_format.describe(learner, learner.init(PARAMS), {"rate": 0.1}, 4)
  old = {
    name: value for name, value in wanted.items() if name not in ("sigma", "fit", "restricted")
  }
  assert checkpoint_format.differences(old, wanted) == []
  old["settings"] = {"rate": 0.2}
  assert checkpoint_format.differences(old, wanted) == ["setting rate: 0.2 in it, 0.1 here"]


def test_a_stored_or_missing_base_is_named(tmp_path):
  predict = lambda p, x, constants: x @ p["slope"] + p["level"] * constants["kernel"][0]
  likelihood = sm.gaussian(predict, 1.0)
  learner, base = sm.sigma_imaml(likelihood, sm.by_leaf(PARAMS)), {"kernel": jnp.ones(3)}
  start = learner.init(PARAMS, constants=base)
  for name, by_value in (("values", True), ("prints", False)):
    with checkpoints.opened(sm.Checkpoints(tmp_path / name, constants=by_value), learner) as store:
      store.save(start)
  blank = learner.init(PARAMS, constants=jax.tree.map(jnp.zeros_like, base))
  values = sm.Checkpoints(tmp_path / "values", constants=True)
  restored = sm.restore(values, learner, blank)
  assert restored is not None
  chex.assert_trees_all_equal(restored.constants, base)
  for found, state, message in (
    (sm.Checkpoints(values.folder), start, r"stores the constants: pass .*constants=True\), "),
    (sm.Checkpoints(tmp_path / "prints", constants=True), start, "does not store the constants"),
    (sm.Checkpoints(tmp_path / "prints"), blank, "constant kernel: "),
  ):
    with pytest.raises(ValueError, match=message):
      sm.restore(found, learner, state)


def test_restore_writes_no_messages_of_orbax(tmp_path, caplog):
  learner = make_learner()
  write(tmp_path, learner, (1,))
  caplog.set_level("INFO", logger="absl")
  sm.restore(sm.Checkpoints(tmp_path), learner, learner.init(PARAMS))
  sm.restore(sm.Checkpoints(tmp_path), learner, learner.init(PARAMS), 1)
  assert [record.getMessage() for record in caplog.records if "orbax" in record.pathname] == []


def test_restore_from_a_folder_without_checkpoints(tmp_path):
  learner = make_learner()
  nowhere = sm.Checkpoints(tmp_path / "none")
  assert sm.restore(nowhere, learner, learner.init(PARAMS)) is None
  with pytest.raises(ValueError, match="no state that was evaluated"):
    sm.restore(nowhere, learner, learner.init(PARAMS), "best")
  assert not (tmp_path / "none").exists()


def test_restore_says_what_is_damaged_and_moves_nothing(tmp_path, caplog):
  learner = make_learner()
  write(tmp_path, learner, (1, 2))
  (tmp_path / "2" / "about" / "metadata").write_text("{}")
  with pytest.raises(OSError, match="step 2: KeyError"):
    sm.restore(sm.Checkpoints(tmp_path), learner, learner.init(PARAMS), 2)
  with caplog.at_level("ERROR", logger="absl"):
    newest_whole = sm.restore(sm.Checkpoints(tmp_path), learner, learner.init(PARAMS))
  assert "The checkpoint of step 2 is damaged, and an older one is used: KeyError" in caplog.text
  chex.assert_trees_all_equal(newest_whole, state_at(learner, 1))
  assert kept(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
  ("before", "after", "message"),
  [
    (dict(make=sm.imaml, init_sigma=0.3), dict(make=sm.imaml, init_sigma=3.0), "'0.3' in it, '3'"),
    (dict(make=sm.maml), dict(make=sm.hand_picked, task_specific=["level"]), "sigma of slope"),
    (dict(), dict(init_sigma={"slope": 0.0, "level": 1.0}), "sigma of slope: absent in it, '0'"),
  ],
)
def test_another_sigma_is_another_run(tmp_path, before, after, message):
  write(tmp_path, make_learner(**before), [1])
  with pytest.raises(ValueError, match=message):
    read(tmp_path, make_learner(**after))


def test_a_learned_sigma_may_have_another_start(tmp_path):
  write(tmp_path, make_learner(init_sigma=0.3), [1])
  chex.assert_trees_all_equal(
    read(tmp_path, make_learner(init_sigma=3.0)), state_at(make_learner(), 1)
  )


def test_two_leaves_with_one_path_are_refused():
  params = {"a": {"b": jnp.zeros(2)}, "a/b": jnp.ones(2)}
  with pytest.raises(ValueError, match="Two leaves are at 'a/b'"):
    checkpoint_format.named(params)
  with pytest.raises(ValueError, match="Two leaves are at 'a/b'"):
    sm.maml(LIKELIHOOD, sm.by_leaf(params)).init(params)


def test_a_refused_run_does_not_open_the_folder(tmp_path, monkeypatch):
  """Orbax's manager deletes unfinished saves when it opens a folder: another run may be saving."""
  write(tmp_path, make_learner(), [1])
  opened = []
  monkeypatch.setattr(orbax.checkpoint, "CheckpointManager", lambda *a, **k: opened.append(a))
  with pytest.raises(ValueError, match="another run"):
    read(tmp_path, make_learner(make=sm.sigma_reptile))
  assert not opened
