#!/usr/bin/env bash
# A reasonable guess: np.random.seed(seed), and then Dataset.from_generator(tasks), whose function
# draws by np.random.normal, gives each seed tasks of its own.
#
# What happens: all seeds get the tasks of the first run. The rows lie in the cache in the home
# folder, under a hash of the function and of the global variables that it reads. The state of
# np.random and of random is not in it, nor are sys.argv, environment variables and files that the
# function opens. A later process with another seed reads the first draw, without a word. map with
# np.random in its function does the same if the data set lies on disk; a data set in memory draws
# anew. And since nothing is drawn, np.random is in another state afterwards than in the first run.
#
# Versions: datasets 5.2.0. The documentation says that results are cached by a hash of the
# transform, also for later sessions. We found no word on random draws there.
#
# Why it matters in meta-learning with JAX: tasks are simulated for five seeds, and the spread over
# seeds is the error bar. Below the five estimates are one number: no spread at all, whatever the
# number of tasks. Augmented or noisy support sets are the same in all repetitions too. And if the
# function reads a file, a corrected file changes nothing.
#
# What to do: pass the seed as gen_kwargs={"seed": seed}, or as fn_kwargs of map, and make the
# generator inside the function: np.random.default_rng(seed). A global variable seed that the
# function reads works too, and so does from_generator(..., fingerprint=f"tasks-{seed}").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  datasets==5.2.0 numpy==2.4.6 pyarrow==26.0.1 pandas==3.1.1
cd "$folder"
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
cat > study.py <<'END'
import json
import random
import sys

import datasets
import numpy as np
from datasets import Dataset

datasets.disable_progress_bars()
count = 50
seed = int(sys.argv[1])
np.random.seed(seed)
random.seed(seed)


def by_numpy():
  for _ in range(count):
    yield {"x": np.random.normal()}


def by_random():
  for _ in range(count):
    yield {"x": random.gauss(0, 1)}


def by_argument():
  draw = np.random.default_rng(int(sys.argv[1]))
  for _ in range(count):
    yield {"x": draw.normal()}


def by_file():
  yield from ({"x": float(line)} for line in open("tasks.txt"))


def by_global():
  draw = np.random.default_rng(seed)
  for _ in range(count):
    yield {"x": draw.normal()}


def by_keyword(seed):
  draw = np.random.default_rng(seed)
  for _ in range(count):
    yield {"x": draw.normal()}


def noisy(row):
  return {"x": row["x"] + np.random.normal()}


def noisy_seed(row, index, seed):
  return {"x": row["x"] + np.random.default_rng((seed, index + 1)).normal()}


with open("tasks.txt", "w") as file:
  file.writelines(f"{np.random.default_rng(seed).normal()}\n" for _ in range(count))
kept = Dataset.from_generator(by_numpy)
memory = Dataset.from_dict({"x": [0.0] * count})
sets = {
  "from_generator, np.random": kept,
  "from_generator, random": Dataset.from_generator(by_random),
  "from_generator, sys.argv": Dataset.from_generator(by_argument),
  "from_generator, a file": Dataset.from_generator(by_file),
  "map on disk, np.random": kept.map(noisy),
  "map in memory, np.random": memory.map(noisy),
  "remedy: a global seed": Dataset.from_generator(by_global),
  "remedy: gen_kwargs": Dataset.from_generator(by_keyword, gen_kwargs={"seed": seed}),
  "remedy: fingerprint": Dataset.from_generator(by_numpy, fingerprint=f"tasks-{seed}"),
  "remedy: fn_kwargs": kept.map(noisy_seed, with_indices=True, fn_kwargs={"seed": seed}),
}
print(json.dumps({name: float(np.mean(rows["x"][:])) for name, rows in sets.items()}))
END
for seed in 0 1 2 3 4; do
  "$folder/venv/bin/python" study.py "$seed" 2>> log >> means || { cat log; exit 1; }
done
"$folder/venv/bin/python" - <<'END'
import importlib.metadata
import json

import numpy as np

print("datasets", importlib.metadata.version("datasets"))
means = [json.loads(line) for line in open("means")]
assert len(means) == 5
print("mean of the 50 rows for seeds 0 to 4, and their standard deviation (expected: 0.14)")
for name in means[0]:
  row = [mean[name] for mean in means]
  print(f"  {name:26}", *(f"{value:6.3f}" for value in row), f"   {np.std(row, ddof=1):.3f}")
  if "remedy" in name or "memory" in name:
    assert len(set(row)) == 5, f"changed: {name}"
  else:
    assert len(set(row)) == 1, f"changed: {name} depends on the seed"
END
