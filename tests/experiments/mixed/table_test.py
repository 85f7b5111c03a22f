"""CSV files: groups of unequal size, and errors that name column and rows."""

import numpy as np
import pytest

from experiments.mixed import table
from experiments.mixed.formula import INTERCEPT, parse

GOOD = "y,x,g\n1.0,2,a\n2.5,3,b\n0.5,4,a\n"
FORMULA = parse("y ~ x + (1 | g)")


def columns(tmp_path, text):
  path = tmp_path / "data.csv"
  path.write_text(text)
  return table.read(path)


def test_groups_become_tasks(tmp_path):
  data = table.grouped(columns(tmp_path, GOOD), FORMULA, "gaussian")
  assert data.groups == ("a", "b") and data.rows == 3
  np.testing.assert_array_equal(data.batches.mask, [[1, 1], [1, 0]])
  np.testing.assert_array_equal(data.batches.inputs["x"], [[2, 4], [3, 0]])
  np.testing.assert_array_equal(data.batches.inputs[INTERCEPT], [[1, 1], [1, 0]])
  np.testing.assert_array_equal(data.batches.targets, [[1.0, 0.5], [2.5, 0]])


@pytest.mark.parametrize(
  "text, formula, message",
  (
    (GOOD, "y ~ z + (1 | g)", "no column 'z'.*3 rows"),
    (GOOD, "y ~ x + (1 | h)", "no column 'h'.*grouping factor.*3 rows"),
    ("y,x,g\n1,2,a\n,3,b\n", "y ~ x + (1 | g)", "'y'.*1 missing values in 2 rows.*row 2"),
    ("y,x,g\n1,NA,a\n2,3,b\n", "y ~ x + (1 | g)", "'x'.*1 missing values in 2 rows.*row 1"),
    ("y,x,g\n1,2,a\n2,3,\n", "y ~ x + (1 | g)", "'g'.*missing"),
    ("y,x,g\nlow,2,a\n2,3,b\n", "y ~ x + (1 | g)", "'y' .the response. is not numeric: 'low'.*2"),
    ("y,x,g\n1,2,a\n2,3,a\n", "y ~ x + (1 | g)", "'g' has one level, 'a', in 2 rows"),
    ("y,x,g\n1,2,a\n1,3,b\n", "y ~ x + (1 | g)", "in all 2 rows"),
    ("y,x,g\n1,2,a\n2,2,b\n", "y ~ x + (1 | g)", "depend on each other"),
    ("y,x,g\n1,inf,a\n2,2,b\n", "y ~ x + (1 | g)", "'x'.*infinite"),
    ("y,x,g\n1,1e300,a\n2,2,b\n", "y ~ x + (1 | g)", "'x'.*huge"),
    ("y,x,g\n1,0,a\n2,0,b\n", "y ~ 1 + (x || g)", "'x'.*is 0 in all 2 rows"),
    ("y,x,g\n1,1_0,a\n2,2,b\n", "y ~ x + (1 | g)", "'x'.*'1_0'"),
  ),
)
def test_errors_name_column_and_rows(tmp_path, text, formula, message):
  with pytest.raises(ValueError, match=message):
    table.grouped(columns(tmp_path, text), parse(formula), "gaussian")


@pytest.mark.parametrize("text", ("NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "NULL", "None", ""))
def test_what_programs_write_for_a_missing_group_is_missing(tmp_path, text):
  with pytest.raises(ValueError, match="'g' .the grouping factor. has 2 missing values in 5 rows"):
    content = GOOD + f'2,2,"{text}"\n3,1,"{text}"\n'
    table.grouped(columns(tmp_path, content), FORMULA, "gaussian")


@pytest.mark.parametrize("x", (lambda t: 1_700_000_000_000 + 600_000 * t, lambda t: 1e-9 * t))
def test_units_do_not_make_columns_depend_on_each_other(tmp_path, x):
  rows = "".join(f"{t % 3},{x(t)!r},{(t * t) % 5},{'ab'[t % 2]}\n" for t in range(6))
  content = "y,x,z,g\n" + rows
  data = table.grouped(columns(tmp_path, content), parse("y ~ x + z + (1 | g)"), "gaussian")
  assert data.rows == 6


@pytest.mark.parametrize("z", (lambda x: x + 7, lambda x: 2 * x, lambda x: 1e12, lambda x: 0.1))
@pytest.mark.parametrize("unit", (1.0, 1e-9, 1e12))
def test_columns_that_depend_on_each_other_in_any_unit(tmp_path, z, unit):
  values = [unit * t for t in (1, 2, 4, 3)]
  rows = "".join(f"{i % 3},{x!r},{z(x)!r},{'ab'[i % 2]}\n" for i, x in enumerate(values))
  with pytest.raises(ValueError, match="depend on each other in 4 rows"):
    formula = parse("y ~ x + z + (1 | g)")
    table.grouped(columns(tmp_path, "y,x,z,g\n" + rows), formula, "gaussian")


@pytest.mark.parametrize("family", ("logistic", "poisson"))
def test_responses_that_a_family_cannot_have(tmp_path, family):
  with pytest.raises(ValueError, match="'y' has others, 3 rows"):
    table.grouped(columns(tmp_path, GOOD), FORMULA, family)


@pytest.mark.parametrize(
  "text, message",
  (
    ("y,x\n", "no rows"),
    ("y,y\n1,2\n", "twice"),
    ("y,x\n1\n", "row 1: 1 fields"),
    ("y;x;g\n1;2;a\n", "separated by commas"),
    ('y,x\n1,"2\n3,4\n', "no CSV file"),
  ),
)
def test_broken_files(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    columns(tmp_path, text)
  with pytest.raises(ValueError, match="no file"):
    table.read(tmp_path / "nothing.csv")


def test_other_encodings_blank_lines_and_no_fixed_part(tmp_path):
  path = tmp_path / "latin.csv"
  path.write_bytes("y,größe\n1,2\n".encode("latin-1"))
  with pytest.raises(ValueError, match="latin.csv is not UTF-8"):
    table.read(path)
  data = table.grouped(columns(tmp_path, GOOD + "\n\n"), parse("y ~ 0 + (1 | g)"), "gaussian")
  assert data.rows == 3
