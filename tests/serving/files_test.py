"""Files of deltas are exact, tied to phi, and read in part; errors name damaged files."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from shrinkmeta.serving import index as delta_index
from shrinkmeta.serving.deltas import Deltas, deltas
from shrinkmeta.serving.files import load_deltas, save_deltas
from tests.serving.deltas_test import (
  LEARNER,
  LIKELIHOOD,
  PARAMS,
  STATE,
  equal,
  owned,
  shards,
  thetas_of,
)

safetensors = pytest.importorskip("safetensors")


def test_saved_and_loaded_to_the_bit(tmp_path):
  own = owned(["a", -5, "5", "../../up", "é\n", "\ud800", "x" * 500])
  save_deltas(tmp_path / "new" / "folder", own)
  back = load_deltas(tmp_path / "new" / "folder", STATE)
  assert equal(own, back) and own.about == back.about
  names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
  assert names == {"deltas.index.safetensors", "deltas.lock", "deltas-0000000000.safetensors"}


def test_some_tasks_in_the_order_asked_for_from_many_shards(tmp_path):
  own = owned(range(10))
  save_deltas(tmp_path, own, shard_bytes=3 * 40)  # 10 float32 a task
  assert len(shards(tmp_path)) == 4
  ids = [8, 1, 0, 9, 4]
  want = jax.tree.map(lambda x: x[jnp.array(ids)], own.thetas)
  got = load_deltas(tmp_path, STATE, ids)
  assert got.ids == tuple(ids)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), want, got.thetas)))


def test_only_the_asked_for_bytes_are_read(tmp_path, monkeypatch):
  save_deltas(tmp_path, owned(range(50)))
  read = []
  concatenate = np.concatenate
  monkeypatch.setattr(
    np, "concatenate", lambda xs: read.append(sum(map(len, xs))) or concatenate(xs)
  )
  load_deltas(tmp_path, STATE, [7, 8, 30])
  assert read == [3, 3, 3]  # the checksums and two leaves


def test_append_and_overwrite(tmp_path):
  save_deltas(tmp_path, owned(["a", "b"]))
  save_deltas(tmp_path, owned(["c"], [2]))
  with pytest.raises(
    ValueError, match="1 of these ids already, the first being 'b'.*overwrite=True"
  ):
    save_deltas(tmp_path, owned(["d", "b"]))
  assert load_deltas(tmp_path, STATE).ids == ("a", "b", "c")
  save_deltas(tmp_path, owned(["b", "d"], [11, 13]), overwrite=True)
  assert equal(load_deltas(tmp_path, STATE), owned(["a", "b", "c", "d"], [0, 11, 2, 13]))
  assert len(shards(tmp_path)) == 3
  save_deltas(tmp_path, load_deltas(tmp_path, STATE), overwrite=True)  # gives back what "b" took
  assert len(shards(tmp_path)) == 1
  assert equal(load_deltas(tmp_path, STATE), owned(["a", "b", "c", "d"], [0, 11, 2, 13]))


def test_arrays_of_any_layout_are_written_in_order(tmp_path):
  plain = thetas_of(range(3))["head"]
  odd = {
    "w": np.asfortranarray(plain["w"]),
    "b": np.ascontiguousarray(np.asarray(plain["b"]).T).T.astype(">f4"),
  }
  assert not odd["w"].flags.c_contiguous and not odd["b"].flags.c_contiguous
  sliced = np.zeros([6, 4, 2], np.float32)
  sliced[::2] = plain["w"]
  for i, w in enumerate([odd["w"], sliced[::2]]):
    own = Deltas(
      {"body": {"w": None, "b": None}, "head": odd | {"w": w}},
      owned(["x", "y", "z"]).about,
    )
    save_deltas(tmp_path / str(i), own)
    assert equal(load_deltas(tmp_path / str(i), STATE), owned(["x", "y", "z"]))


def test_another_phi_is_refused_by_the_name_of_its_leaf(tmp_path):
  save_deltas(tmp_path, owned(["a"]))
  other = LEARNER.init(PARAMS | {"body": PARAMS["body"] | {"b": jnp.full(4, 1e-30)}})
  with pytest.raises(ValueError, match=r"state\.phi/body/b was float32\[4\] \w{8} when"):
    load_deltas(tmp_path, other)
  with pytest.raises(ValueError, match="state.phi/body/b"):
    save_deltas(tmp_path, deltas(LEARNER, other, thetas_of([1]), ["b"]))
  whole = sm.fomaml(LIKELIHOOD, sm.by_layer(PARAMS))
  same_phi = whole.init(STATE.phi)
  all_move = deltas(whole, same_phi, jax.tree.map(lambda p: p[None], STATE.phi), ["b"])
  with pytest.raises(ValueError, match="other moving: .*head/b"):
    save_deltas(tmp_path, all_move)


def test_wrong_arguments(tmp_path):
  own = owned(["a"])
  with pytest.raises(TypeError, match="deltas must be shrinkmeta.Deltas"):
    save_deltas(tmp_path, own.thetas)
  with pytest.raises(ValueError, match="anonymous"):
    save_deltas(tmp_path, own.anonymous())
  with pytest.raises(ValueError, match="dtype must be"):
    save_deltas(tmp_path, own, dtype="float8", state=STATE)
  with pytest.raises(ValueError, match="state is None"):
    save_deltas(tmp_path, own, dtype="int8")
  with pytest.raises(ValueError, match="1 ids.*leading axes"):
    save_deltas(tmp_path, jax.tree.map(lambda x: jnp.concatenate([x, x]), own))
  changes = (
    (lambda x: x.astype(jnp.bfloat16), r"has bfloat16\[2\] .*, where phi/head/b was float32\[2\]"),
    (lambda x: x[..., :1], r"has float32\[1\] for each task, where phi/head/b"),
    (lambda x: x * jnp.nan, "phi/head/b has NaN or infinite entries in 1 tasks, .*'a'"),
  )
  for change, message in changes:  # a tree.map can do all this
    for dtype in (None, "int8"):
      with pytest.raises(ValueError, match=message):
        save_deltas(tmp_path, jax.tree.map(change, own), dtype=dtype, state=STATE)
  with pytest.raises(FileNotFoundError, match="holds no deltas"):
    load_deltas(tmp_path, STATE)
  save_deltas(tmp_path, own)
  with pytest.raises(TypeError, match="state must be"):
    load_deltas(tmp_path, PARAMS)
  with pytest.raises(KeyError, match="'b': unknown to .*1 tasks"):
    load_deltas(tmp_path, STATE, ["a", "b"])
  with pytest.raises(ValueError, match="ids has repetitions"):
    load_deltas(tmp_path, STATE, ["a", "a"])


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_every_flipped_bit_is_found(tmp_path, dtype):
  """A bit in each eighth byte of the shard, its header included."""
  own = owned(["ann", "bob"])
  save_deltas(tmp_path, own, dtype=dtype, state=STATE)
  want = load_deltas(tmp_path, STATE)
  (shard,) = shards(tmp_path)
  whole = shard.read_bytes()
  start = 8 + int.from_bytes(whole[:8], "little")
  about = whole.index(b'"__metadata__"'), whole.index(b"}") + 1  # says nothing of the numbers
  found = 0
  for at in [*range(0, start, 8), *range(start, len(whole))]:
    if about[0] <= at < about[1] or whole[at : at + 1] == b" ":
      continue
    damaged = bytearray(whole)
    damaged[at] ^= 1 << (at % 8)
    shard.write_bytes(damaged)
    with pytest.raises((OSError, ValueError), match=shard.name):
      load_deltas(tmp_path, STATE)
    found += 1
  shard.write_bytes(whole)
  assert found > 60 and equal(load_deltas(tmp_path, STATE), want)


def test_a_flipped_bit_is_named_and_spares_other_tasks(tmp_path):
  save_deltas(tmp_path, owned(["ann", "bob"]))
  (shard,) = shards(tmp_path)
  header = json.loads(shard.read_bytes()[8:].split(b"}}")[0] + b"}}")
  at = shard.stat().st_size - (
    max(x["data_offsets"][1] for n, x in header.items() if n != "__metadata__")
  )
  at += header["theta/head/w"]["data_offsets"][0] + 32 + 5  # the second of two rows of 32 bytes
  data = bytearray(shard.read_bytes())
  data[at] ^= 4
  shard.write_bytes(data)
  with pytest.raises(
    OSError, match=f"{shard.name} is damaged: tensor 'theta/head/w', row 1.*'bob'"
  ):
    load_deltas(tmp_path, STATE)
  assert load_deltas(tmp_path, STATE, ["ann"]).ids == ("ann",)


def test_truncated_foreign_and_missing_files_are_named(tmp_path):
  save_deltas(tmp_path, owned(["a"]))
  (shard,) = shards(tmp_path)
  whole = {path: path.read_bytes() for path in (shard, tmp_path / delta_index.INDEX)}
  for path, data in whole.items():
    for size in (0, 5, 100, len(data) - 1):
      path.write_bytes(data[:size])
      with pytest.raises(OSError, match=f"{path.name} is damaged or truncated"):
        load_deltas(tmp_path, STATE)
    path.write_bytes(safetensors.numpy.save({"other": np.zeros(3)}))
    with pytest.raises(ValueError, match=f"{path.name} is no .* of deltas"):
      load_deltas(tmp_path, STATE)
    path.write_bytes(data)
  for at in range(8, len(data), 7):
    delta_index._read_index.cache_clear()  # the index that is in memory is whole
    flipped = bytearray(data)
    flipped[at] ^= 2
    path.write_bytes(flipped)
    with pytest.raises((OSError, ValueError), match=f"{path.name}"):
      load_deltas(tmp_path, STATE)
  path.write_bytes(data)
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=f"{shard.name}, which the index names, is missing"):
    load_deltas(tmp_path, STATE)
  shard.write_bytes(whole[shard])
  path.unlink()
  with pytest.raises(FileNotFoundError, match="has shards and no deltas.index"):
    save_deltas(tmp_path, owned(["b"]))


def test_equal_hashes_do_not_mix_ids(monkeypatch):
  monkeypatch.setattr(delta_index, "_keys", lambda texts: np.zeros(len(texts), np.uint64))
  index = delta_index.empty_index({})
  index = index.updated(["a", "b", 1], np.array([[0, 0], [0, 1], [0, 2]], np.uint32), 1)
  assert index.find([1, "c", "a", "1"]).tolist() == [2, -1, 0, -1]


def test_the_index_takes_less_than_100_bytes_a_task():
  index = delta_index.empty_index({})
  ids = [f"user-{i:012d}-{i * 7919 % 1000003:08x}" for i in range(5000)]
  index = index.updated(ids, np.zeros([5000, 2], np.uint32), 1)
  assert sum(x.nbytes for x in index[1:]) / 5000 < 100
  assert index.ids() == tuple(ids)


def test_without_safetensors_the_error_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
  with pytest.raises(ImportError, match=r"shrinkmeta\[adapters\]"):
    save_deltas(tmp_path, owned(["a"]))
