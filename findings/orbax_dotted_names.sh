#!/usr/bin/env bash
# A reasonable guess: a checkpoint of {"head": {"kernel": a}, "head.kernel": b} gives a and b back,
# or is refused.
#
# What happens: both leaves are stored under the name head.kernel. Saving and restoring succeed,
# and both leaves come back with one value: that of a or that of b, which may differ from one save
# to the next. Where the shapes differ, saving fails.
#
# Versions: orbax-checkpoint 0.12.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: task-specific parts are often kept in a flat dict under
# dotted names ("head.kernel": delta) beside the nested parameters. The deltas silently become the
# shared values, or the reverse.
#
# What to do: put the two under keys of their own ({"phi": ..., "deltas": ...}), or use another
# separator. shrinkmeta saves a flat dict of names joined by "/".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import logging
import os

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.ERROR)


def there_and_back(name, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(os.path.join(os.getcwd(), name), tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(os.path.join(os.getcwd(), name), tree)


for i in range(3):
  tree = {"head": {"kernel": jnp.full(2, 1.0)}, "head.kernel": jnp.full(2, 2.0)}
  back = there_and_back(f"clash_{i}", tree)
  nested, flat = np.asarray(back["head"]["kernel"]), np.asarray(back["head.kernel"])
  print(f"save {i}: nested 1 -> {nested}, dotted 2 -> {flat}")
  assert np.array_equal(nested, flat), "changed: both come back"
apart = {"phi": {"head": {"kernel": jnp.full(2, 1.0)}}, "deltas": {"head.kernel": jnp.full(2, 2.0)}}
back = there_and_back("apart", apart)
print("under keys of their own:", back)
assert float(back["phi"]["head"]["kernel"][0]) == 1 and float(back["deltas"]["head.kernel"][0]) == 2
END
