#!/usr/bin/env bash
# A reasonable guess: the codes of a categorical column, to_physical(), number the categories of
# that column from 0 in the order in which they appear, as pandas' codes number theirs.
#
# What happens: all columns of the type Categorical in a process share one numbering. A column of
# two tasks has the codes 3 and 4 if three speakers were read before, also as another column of the
# same frame. Another program, in which the speakers are read later or not at all, gives the same
# tasks the codes 0 and 1. Once no column is left, the numbering starts again.
#
# Versions: polars 2.1.0. The documentation of using_string_cache says that it now always returns
# True, because pl.Categories holds the mapping. Issue 23948 of pola-rs/polars reports such codes.
#
# Why it matters in meta-learning with JAX: a code is the obvious row of a task in arrays
# [tasks, ...]. Training and serving, or two seeds of a script, then read different rows: the
# parameters of another task. A code beyond the end is no error in JAX, which takes the last row.
#
# What to do: cast to pl.Enum(names), whose codes are positions in that list, and store the list
# with the arrays. sm.deltas stores names, and index looks a name up.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check polars==2.1.0
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import polars as pl

print("polars", pl.__version__)


def codes(names, dtype=pl.Categorical):
  column = pl.Series(names, dtype=dtype)
  return column, column.to_physical().to_list()


tasks = ["ja", "ko"]
alone = codes(tasks)[1]  # the column is gone, and with it its categories
print("tasks alone                     ", alone)
speakers, of_speakers = codes(["s1", "s2", "s3"])
kept, after = codes(tasks)
print("speakers                        ", of_speakers)
print("tasks, while the speakers exist ", after)
frame = pl.DataFrame({"a": ["x", "y"], "b": ["u", "v"]}, schema=dict.fromkeys("ab", pl.Categorical))
columns = [frame[name].to_physical().to_list() for name in "ab"]
print("two columns of one frame        ", columns)
new = codes(["ko", "zh"])[1]
print("new data: ko, zh                ", new)
enum = codes(tasks, pl.Enum(tasks))[1]
print("as an Enum                      ", enum)
del speakers, kept, frame
again = codes(tasks)[1]
print("tasks, after the others are gone", again)
assert alone == [0, 1] and of_speakers == [0, 1, 2], "changed: the first column"
assert after == [3, 4], "changed: columns have a numbering of their own"
assert columns == [[5, 6], [7, 8]], "changed: the columns of a frame"
assert new == [4, 9], "changed: new data"
assert enum == [0, 1], "changed: Enum"
assert again == [0, 1], "changed: the numbering starts again"
END
