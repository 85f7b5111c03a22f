#!/usr/bin/env bash
# A reasonable guess: default_rng(5), default_rng([5, 0]) and default_rng([5, 0, 0]) are three
# streams.
#
# What happens: they are one stream. A seed is cut into words of 32 bits, and missing words up to
# four are filled up with zeros. So 5, (5, 0), (5, 0, 0) and (5, 0, 0, 0) are equal, and so are 5 +
# 2**32 and (5, 1). Only a fifth word, even a zero, makes another stream: that of the first child
# that SeedSequence(5) spawns.
#
# Versions: numpy 2.4.6.
#
# Why it matters in meta-learning with JAX: (seed, task) and (seed, epoch, task) are common seeds
# for episodes. Task 0 then gets the very numbers that default_rng(seed) gave for the initial
# parameters or the split, and (seed, 1) is task 1 as well as epoch 1 of another part of the
# program.
#
# What to do: give every use the same number of words and a first word that names the use, or spawn
# from one SeedSequence: children differ from their parent. jax.random.fold_in(key, 0) does differ
# from key.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np

draw = lambda seed: np.random.default_rng(seed).integers(1000, size=4).tolist()
for seed in (5, [5], (5, 0), (5, 0, 0), (5, 0, 0, 0), (5, 0, 0, 0, 0), (5, 1), 5 + 2**32):
  print(f"{str(seed):16}", draw(seed))
child = np.random.SeedSequence(5).spawn(1)[0]
print("first child of 5", draw(child))
assert draw(5) == draw([5]) == draw((5, 0)) == draw((5, 0, 0, 0)), "changed: zeros"
assert draw(5) != draw((5, 0, 0, 0, 0)), "changed: a fifth word"
assert draw(5 + 2**32) == draw((5, 1)), "changed: large seeds"
assert draw(child) == draw((5, 0, 0, 0, 0)), "changed: spawn"
END
