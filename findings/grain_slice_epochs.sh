#!/usr/bin/env bash
# A reasonable guess: d = MapDataset.source(...).shuffle(seed); d[:80] and d[80:] split 100 records
# for good, and d[:80].repeat(5) gives the same 80 records five times.
#
# What happens: the split holds for one epoch. From the second on, the slice is taken from another
# permutation of all 100 records. After two epochs 14 of the 20 held-out records have been trained
# on, after five all 20. Within each epoch the 80 are distinct, so counts and lengths look right,
# and listing both slices once shows no overlap.
#
# Versions: grain 0.2.18. A public issue about 0.2.15 has reported it, and is open. The
# documentation says that shuffle draws anew in each epoch, and that a slice holds the elements at
# its indices; it does not put the two together.
#
# Why it matters in meta-learning with JAX: if the records are tasks, the tasks held out to choose
# sigma or to stop training become training tasks. The loss on them falls, and no number shows why.
# The same holds for support and query of one task, and for shards d[i::n].
#
# What to do: permute once before grain, or cut before shuffle. repeat(n, reseed_each_epoch=False)
# keeps the split, and gives up the new order in each epoch. shrinkmeta takes the tasks that you
# pass and cannot see which were held out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  grain==0.2.18 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import importlib.metadata

import grain
import numpy as np

print("grain", importlib.metadata.version("grain"), "numpy", np.__version__)
count = 100
shuffled = grain.MapDataset.source(range(count)).shuffle(seed=0)
train, test = shuffled[:80], shuffled[80:]
held_out = set(test)
print("one pass over both:", len(set(train)), "and", len(held_out), "records, in both:", end=" ")
print(len(set(train) & held_out))
leaked = {}
for epochs in (1, 2, 5):
  read = list(train.repeat(epochs))
  assert len(read) == len(train.repeat(epochs)) == 80 * epochs
  assert all(len(set(read[e * 80 : e * 80 + 80])) == 80 for e in range(epochs))
  leaked[epochs] = len(held_out.intersection(read))
  print(f"{epochs} epochs: {len(read)} records read, {leaked[epochs]} of 20 held-out ones among them")
again = set(train.shuffle(seed=1).repeat(5).to_iter_dataset())
print("shuffled again after the cut, as an iterator, 5 epochs:", len(again & held_out))
frozen = len(held_out.intersection(train.repeat(5, reseed_each_epoch=False)))
print("reseed_each_epoch=False, 5 epochs:", frozen)
order = np.random.default_rng(0).permutation(count).tolist()
first = grain.MapDataset.source(order)[:80].shuffle(seed=0).repeat(5)
kept = len(set(first) & set(grain.MapDataset.source(order)[80:]))
print("permuted by numpy, cut, then shuffled, 5 epochs:", kept)

assert leaked[1] == 0, "changed: the first epoch"
assert leaked[2] >= 10 and leaked[5] >= 18, "changed: a slice keeps its records"
assert len(again & held_out) >= 18, "changed: a second shuffle"
assert frozen == kept == 0, "changed: a remedy"
END
