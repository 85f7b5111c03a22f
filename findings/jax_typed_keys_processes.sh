#!/usr/bin/env bash
# A reasonable guess: jax.device_put copies an array that every process has to the devices of all
# processes, whatever its type: a float array, the words of a raw key, a typed key.
#
# What happens: it takes float arrays and raw keys, and refuses typed keys, jax.random.key, with an
# error about addressable devices that names neither the key nor its type. So a state with a key of
# dropout, or a key beside the state, can be placed in one process and not in two.
#
# Versions: jax and jaxlib 0.10.2, CPU backend, two processes.
#
# Output seen, in each process: floats fine, raw key fine, typed key refused, wrapped words fine.
#
# Why it matters in meta-learning with JAX: keys are part of states and of updates, and a program
# that runs on one host with many devices stops at its first line on two hosts.
#
# What to do: place jax.random.key_data(key) as NumPy words, and wrap them again by
# jax.random.wrap_key_data. shrinkmeta's place_state does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
cat >place.py <<'END'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

port, process = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process), initialization_timeout=60)
everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("tasks",)), PartitionSpec())
key = jax.random.key(0)
words = np.asarray(jax.random.key_data(key))
cases = {
  "floats": lambda: jax.device_put(jnp.ones(2), everywhere),
  "raw key": lambda: jax.device_put(jax.random.PRNGKey(0), everywhere),
  "typed key": lambda: jax.device_put(key, everywhere),
  "wrapped words": lambda: jax.random.wrap_key_data(jax.device_put(words, everywhere)),
}
found = {}
for name, place in cases.items():
  try:
    jax.block_until_ready(place())
    found[name] = "fine"
  except ValueError as error:
    assert "addressable" in str(error), error
    found[name] = "refused"
print(f"process {process}: {found}")
refused = {name for name, how in found.items() if how == "refused"}
assert refused == {"typed key"}, refused
END
port=$("$folder/venv/bin/python" -c \
  'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" place.py "$port" 0 2>/dev/null | grep process &
"$folder/venv/bin/python" place.py "$port" 1 2>/dev/null | grep process
wait $!
