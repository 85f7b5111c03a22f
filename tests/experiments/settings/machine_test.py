"""Impossible descriptions of several processes are refused before JAX starts."""

import json
import socket

import jaxlib
import pytest

from experiments.settings import machine

ALONE = """
import os, runpy, sys
for name in list(os.environ):
  if name.startswith(("SLURM", "OMPI", "KUBERNETES", "JOB_COMPLETION", "TPU", "MEGASCALE")):
    del os.environ[name]
sys.argv = ["train", "--distributed"]
runpy.run_module("experiments.train", run_name="__main__")
"""


@pytest.mark.parametrize(
  "address, number, own, message",
  (
    ("localhost", 2, 0, "host:port with a port of 1 to 65535, as in .*; got 'localhost'"),
    ("localhost:99999", 2, 0, "got 'localhost:99999'"),
    ("localhost:0", 2, 0, "got 'localhost:0'"),
    ("http://localhost:80", 2, 0, "got 'http://localhost:80'"),
    (":1234", 2, 0, "got ':1234'"),
    ("localhost:9999", 0, 0, "--num_processes is at least 1; got 0"),
    ("localhost:9999", -1, 0, "--num_processes is at least 1; got -1"),
    ("localhost:9999", 2, 2, "--process_id is 0 to 1, one less than --num_processes=2; got 2"),
    ("localhost:9999", 2, -1, "--process_id is 0 to 1, .*; got -1"),
    ("nowhere.invalid:9999", 2, 1, "--coordinator_address=nowhere.invalid:9999: "),
  ),
)
def test_processes_that_cannot_find_each_other(address, number, own, message):
  with pytest.raises(ValueError, match=message):
    machine.start_jax(processes=machine.Processes(address, number, own))


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as server:
    address = f"localhost:{server.getsockname()[1]}"
    with pytest.raises(ValueError, match=f"{address}: .*a port that is free"):
      machine.start_jax(processes=machine.Processes(address, 2, 0))


def test_a_wrong_start_is_one_sentence(python):
  """Without anything that starts several processes: JAX would say so by a traceback."""
  done = python(program=ALONE)
  told = done.stderr + done.stdout
  assert done.returncode == 1 and "Traceback" not in told, told
  assert "The processes of this run did not find each other" in told


TWICE = """
import json, os, sys
import jax, jax.numpy as jnp
from experiments.settings import machine
cache = json.loads(sys.argv[2])
if cache != "":  # "" switches the cache off, also that of the environment
  del os.environ["JAX_COMPILATION_CACHE_DIR"]
os.environ["XDG_CACHE_HOME"] = sys.argv[1]
machine.start_jax(cache=cache)
assert cache != "" or jax.config.jax_compilation_cache_dir is None
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))

@jax.jit
def slow_to_compile(x):
  for k in range(1, 41):
    x = jnp.sort(jnp.cumsum(jnp.sin(k * x)))
  return x

value = slow_to_compile(jnp.linspace(0.0, 1.0, 64))
hits = sum(event.endswith("cache_hits") for event in seen)
print(json.dumps({"hits": hits, "value": float(value[0])}))
"""


def test_a_second_start_compiles_no_large_program_again(python, tmp_path):
  def start(cache):
    done = python(tmp_path, json.dumps(cache), program=TWICE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

  off, first, second = start(""), start(None), start(None)
  assert off["hits"] == first["hits"] == 0 < second["hits"]
  assert off["value"] == first["value"] == second["value"]
  (folder,) = (tmp_path / "shrinkmeta").iterdir()
  assert folder.name.startswith(f"programs-{jaxlib.__version__}-") and any(folder.iterdir())
  for damaged in folder.glob("*-cache"):
    damaged.write_bytes(b"no program")
  assert start(None)["value"] == off["value"]
  assert start(str(tmp_path / "own"))["hits"] == 0 and any((tmp_path / "own").iterdir())
