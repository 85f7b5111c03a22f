#!/usr/bin/env bash
# A reasonable guess: params and optimizer.init(params) are arrays of their own, so the first update
# may donate both, as every later one may.
#
# What happens: six optimisers of optax.contrib begin with a state that holds arrays of the
# parameters themselves, or one array twice. The first donation of (params, state) raises "Attempt to
# donate the same buffer twice". The error names neither the optimiser nor the leaf.
#
# Versions: optax 0.2.8, jax and jaxlib 0.10.2, CPU backend.
#
# Output seen: cocob shares arrays within its state; dog, dowg, madgrad, mechanize and prodigy share
# arrays with the parameters; adam, momo and schedule_free_sgd share nothing.
#
# Why it matters in meta-learning with JAX: large states are donated, and a run with a learning-rate
# free optimiser ends at its first update with an error that names no optimiser.
#
# What to do: copy the fresh state, jax.tree.map(jnp.array, state). shrinkmeta's init does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - 2>/dev/null <<'END'
import jax
import jax.numpy as jnp
import optax
from optax import contrib

OPTIMISERS = {
  "adam": optax.adam(1e-3),
  "cocob": contrib.cocob(),
  "dog": contrib.dog(),
  "dowg": contrib.dowg(),
  "madgrad": contrib.madgrad(1e-2),
  "mechanize": contrib.mechanize(optax.sgd(0.1)),
  "momo": contrib.momo(),
  "prodigy": contrib.prodigy(),
  "schedule_free_sgd": contrib.schedule_free_sgd(0.1),
}
double = jax.jit(lambda trees: jax.tree.map(lambda x: 2 * x, trees), donate_argnums=0)
found = {}
for name, optimiser in OPTIMISERS.items():
  params = {"w": jnp.arange(3.0), "b": jnp.ones(4)}
  copied = jax.tree.map(jnp.array, optimiser.init(params))
  for what, trees in (("state", optimiser.init(params)), ("params and state", None), ("copy", None)):
    params = {"w": jnp.arange(3.0), "b": jnp.ones(4)}
    if what == "params and state":
      trees = (params, optimiser.init(params))
    elif what == "copy":
      trees = (params, copied)
    try:
      jax.block_until_ready(double(trees))
      found[name, what] = "fine"
    except Exception as error:
      assert "donate the same buffer twice" in str(error), error
      found[name, what] = "refused"
  print(f"{name:18}", {what: found[name, what] for what in ("state", "params and state", "copy")})
refused = lambda what: {name for name in OPTIMISERS if found[name, what] == "refused"}
assert refused("state") == {"cocob"}, refused("state")
both = {"cocob", "dog", "dowg", "madgrad", "mechanize", "prodigy"}
assert refused("params and state") == both, refused("params and state")
assert not refused("copy")
END
