"""Descriptions of several processes that cannot work are refused before JAX starts."""

import socket

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
