import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs import files, results


def test_atomic_hides_the_file_until_it_is_whole(tmp_path):
  names = lambda: sorted(file.name for file in tmp_path.iterdir())
  with pytest.raises(KeyboardInterrupt), files.atomic(tmp_path / "result.json") as temporary:
    temporary.write_text("half")
    assert "result.json" not in names()
    raise KeyboardInterrupt
  assert names() == []


def test_numbers_of_numpy_and_paths_are_written():
  content = {
    "a": np.float32(0.5), "b": np.int64(3), "c": [np.bool_(True)], "d": np.arange(2),
    "e": jnp.ones(2), "f": pathlib.Path("runs/x"), "g": np.float64("nan"),
  }  # fmt: skip
  wanted = {"a": 0.5, "b": 3, "c": [True], "d": [0, 1], "e": [1.0, 1.0], "f": "runs/x", "g": None}
  assert json.loads(files.strict_json(content)) == wanted


def test_a_result_with_a_path_and_a_byte_order_mark(tmp_path):
  path = tmp_path / "x.json"
  results.write_json(path, {"out": pathlib.Path("runs/x"), "rate": np.float32(0.5)}, [], {})
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert results.read_json(path) == ({"out": "runs/x", "rate": 0.5}, [])


@pytest.mark.parametrize("damaged", ("{", "[]", "{}", b"\xff"))
def test_a_damaged_stage_is_computed_again(tmp_path, caplog, damaged):
  file = tmp_path / "rate.json"
  file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
  found = files.stage(file, lambda: {"rate": 0.5})
  assert found["rate"] == 0.5 and set(found) == {"rate", "seconds"}
  assert f"{file} " in caplog.text and "Making it again" in caplog.text
  assert files.stage(file, lambda: pytest.fail("it is there")) == found


def test_a_fingerprint_tells_data_apart():
  tree = {"a": np.arange(6, dtype=np.uint8), "b": jnp.ones([])}
  other = {**tree, "a": tree["a"].reshape(2, 3)}
  assert files.fingerprint(tree) == files.fingerprint({**tree, "a": tree["a"].copy()})
  changed = {**tree, "b": jnp.zeros([])}
  assert len({files.fingerprint(x) for x in (tree, other, changed)}) == 3
