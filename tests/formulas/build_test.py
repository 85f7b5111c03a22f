"""Designs equal written-out matrices and R's conventions; errors name the column and the rows."""

import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from shrinkmeta.formulas.build import design, new_rows, prepare
from shrinkmeta.formulas.table import read

ROWS = 60


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  return {
    "y": rng.normal(size=ROWS),
    "x": rng.normal(size=ROWS),
    "f": list("cab" * 20),
    "yes": ["Yes", "No", "No", "Yes", "No"] * 12,
    "year": [2010, 999, 2001, 2001] * 15,
    "a": np.repeat([2, 10], 30),
    "g": np.tile(np.repeat(np.arange(5), 6), 2),
    "n": rng.integers(1, 9, ROWS),
    "body weight": rng.uniform(1, 5, ROWS),
  }


def test_plain_columns_and_groups_in_the_order_of_their_rows():
  data = {"y": [1.0, 2.5, 0.5], "x": [2, 3, 4], "g": ["b", "a", "b"]}
  made = design("y ~ x + (x || g)", data)
  assert made.fixed_names == ("(Intercept)", "x") and made.response_name == "y"
  np.testing.assert_array_equal(made.fixed, [[1, 2], [1, 3], [1, 4]])
  np.testing.assert_array_equal(made.response, [1.0, 2.5, 0.5])
  (term,) = made.random
  assert (term.group, term.levels, term.names) == ("g", ("b", "a"), ("(Intercept)", "x"))
  assert term.index.tolist() == [0, 1, 0] and not term.correlated
  np.testing.assert_array_equal(term.columns, made.fixed)
  assert made.offset.tolist() == [0, 0, 0] and made.weights is made.trials is None


def test_levels_and_their_reference(data):
  made = design("y ~ f + C(year) + yes + (1 | g)", data)
  names = "(Intercept) f[T.b] f[T.c] C(year)[T.2001] C(year)[T.2010] yes[T.Yes]"
  assert made.fixed_names == tuple(names.split())
  f, year = np.array(data["f"]), np.array(data["year"])
  for name, want in (("f[T.b]", f == "b"), ("f[T.c]", f == "c"), ("C(year)[T.2010]", year == 2010)):
    np.testing.assert_array_equal(made.fixed[:, made.fixed_names.index(name)], want)
  other = design("y ~ C(f, Treatment('b')) + (1 | g)", data)
  assert [n[-5:] for n in other.fixed_names[1:]] == ["[T.a]", "[T.c]"]
  ordered = pd.DataFrame(data).assign(f=pd.Categorical(data["f"], ["c", "a", "b", "z"]))
  assert design("y ~ f + (1 | g)", ordered).fixed_names[1:] == ("f[T.a]", "f[T.b]")


@pytest.mark.parametrize(
  "text, patsy",
  (
    ("x * f", "x * f"),
    ("x - 1 + f", "0 + x + f"),
    ("f:x", "f:x"),
    ("x / f", "x / f"),
    ("(x + f)^2", "(x + f)**2"),
    ("C(f, Sum)", "C(f, Sum)"),
    ("I(x^2) + exp(x)", "I(x**2) + np.exp(x)"),
    ("scale(x)", "I((x - x.mean()) / x.std())"),
    ("I(f == 'b'):x", "I((f == 'b') * 1.0 * x)"),
    ("bs(x, df=4)", "bs(x, df=4)"),
    ("cr(x, df=4)", "cr(x, df=4, constraints='center')"),
    ("cc(x, df=3) * f", "cc(x, df=3, constraints='center') * f"),
    ("f * yes", "f * yes"),
  ),
)
def test_fixed_columns_span_what_patsy_makes(data, text, patsy):
  import patsy as package

  made = design(f"y ~ {text} + (1 | g)", data)
  want = np.asarray(package.dmatrix(patsy, pd.DataFrame(data)))
  assert made.fixed.shape == want.shape
  both = np.column_stack([made.fixed, want])
  assert np.linalg.matrix_rank(both, tol=1e-8) == want.shape[1]


def test_polynomials_are_orthonormal_as_those_of_r(data):
  made = design("y ~ poly(x, 2) + (1 | g)", data)
  np.testing.assert_allclose(made.fixed[:, 1:].T @ made.fixed[:, 1:], np.eye(2), atol=1e-12)
  np.testing.assert_allclose(made.fixed[:, 1:].sum(0), 0, atol=1e-12)
  x = data["x"]
  raw = design("y ~ poly(x, 2, raw=TRUE) + (1 | g)", data)
  np.testing.assert_allclose(raw.fixed, np.stack([np.ones(ROWS), x, x**2], 1))
  assert [name[-3:] for name in raw.fixed_names[1:]] == ["[1]", "[2]"]


def test_natural_splines_go_on_as_lines(data):
  _, template = prepare("y ~ cr(x, df=3) + (1 | g)", data)
  rows = new_rows(template, {"x": [10.0, 11.0, 12.0, 13.0], "g": [0] * 4}).fixed
  np.testing.assert_allclose(np.diff(rows, 2, axis=0), 0, atol=1e-9)
  _, template = prepare("y ~ bs(x, df=4) + (1 | g)", data)
  with pytest.raises(ValueError, match=r"outside of the range of the fit.*cr\(...\) goes on"):
    new_rows(template, {"x": [10.0], "g": [0]})


def test_truth_values_are_numbers_where_a_number_is_wanted(data):
  true = np.array(["TRUE", "FALSE", "FALSE"] * 20)
  for column in (true, true == "TRUE"):
    made = design("y ~ as.numeric(b) + I(b * x^2) + (1 | g)", data | {"b": column})
    assert made.fixed_names[1:] == ("as.numeric(b)", "I(b * x^2)")
    np.testing.assert_array_equal(made.fixed[:, 1], true == "TRUE")
    np.testing.assert_allclose(made.fixed[:, 2], (true == "TRUE") * data["x"] ** 2)
    response = design("b ~ x + (1 | g)", data | {"b": column}).response
    np.testing.assert_array_equal(response, true == "TRUE")
    assert "b[T." in design("y ~ b + (1 | g)", data | {"b": column}).fixed_names[1]


@pytest.mark.parametrize(
  "number, text",
  (
    ("C(k, levels=[2, 1, 0])", "C(k, levels=['2', '1', '0'])"),
    ("C(k, levels=[2.0, 1, 0])", "C(k, levels=['2', '1', '0'])"),
    ("C(k, Treatment(1))", "C(k, Treatment('1'))"),
    ("factor(k, contr.treatment(base=2.0))", "C(k, Treatment('2'))"),
    ("C(k, Sum, levels=[2, 1, 0])", "C(k, Sum, levels=['2', '1', '0'])"),
    ("C(h, Treatment(-0.5))", "C(h, Treatment('-0.5'))"),
    ("C(b, levels=[TRUE, FALSE])", "C(b, levels=['True', 'False'])"),
  ),
)
def test_numbers_name_levels(data, number, text):
  k = np.arange(ROWS) % 3
  more = data | {"k": k, "h": k / 2 - 0.5, "b": k > 0}
  one, other = (design(f"y ~ {term} + (1 | g)", more) for term in (number, text))
  np.testing.assert_array_equal(one.fixed, other.fixed)
  if number == "C(k, Treatment(1))":
    np.testing.assert_array_equal(one.fixed, np.stack([k >= 0, k == 0, k == 2], 1))
  scores = design("y ~ C(k, Poly(scores=[0, 1, 4])) + (1 | g)", more).fixed[:, 1]
  assert np.corrcoef(scores, np.array([0, 1, 4])[k])[0, 1] == pytest.approx(1.0)
  with pytest.raises(ValueError, match="k has the levels '0', '1', '2'"):
    design("y ~ C(k, Treatment(7)) + (1 | g)", more)


def test_truth_values_are_numbers_in_arguments_and_offsets(data):
  k = np.arange(ROWS) % 2
  for b in (k == 1, np.where(k, "TRUE", "FALSE"), pd.Categorical(k == 1)):
    more = data | {"b": b, "k": k, "one": np.ones(ROWS, bool), "c": k == 0}
    made, template = prepare("y ~ b + offset(b) + (1 | g)", more, offset="b", weights="one")
    np.testing.assert_array_equal(made.offset, 2 * k)
    np.testing.assert_array_equal(made.weights, np.ones(ROWS))
    assert "b[T." in made.fixed_names[1]  # a term of the fixed part stays a factor
    again = new_rows(template, {name: list(more[name])[3:5] for name in ("b", "g", "one")})
    np.testing.assert_array_equal(again.offset, [2.0, 0.0])
    for text, options in (
      ("k ~ x + (1 | g)", {"trials": "one"}),
      ("cbind(b, c) ~ x + (1 | g)", {}),
    ):
      made = design(text, more, family="logistic", **options)
      np.testing.assert_array_equal([made.response, made.trials], [k, np.ones(ROWS)])
  # The fitted rows have one of the two values: an offset is a number, and needs no known level.
  _, template = prepare("y ~ x + offset(one) + (1 | g)", more)
  new = {"x": [0.0], "g": [0], "one": [False]}
  assert new_rows(template, new).offset.tolist() == [0.0]
  with pytest.raises(ValueError, match=r"Column 'f' \(the weights\) is not numeric: 'c' in row 1"):
    design("y ~ x + (1 | g)", data, weights="f")
  with pytest.raises(ValueError, match="must be one column of numbers; got 3 columns"):
    design("y ~ x + offset(C(f)) + (1 | g)", data)


def test_masked_numbers_are_missing_in_arguments_too(data):
  mask = np.arange(ROWS) < 7
  masked = np.ma.array(np.where(mask, -999.0, 2.0), mask=mask)
  made = design("y ~ x + (1 | g)", data, weights=masked, offset=masked)
  assert made.dropped == (("argument weights is missing", 7),)
  np.testing.assert_array_equal(made.weights, np.full(ROWS - 7, 2.0))
  np.testing.assert_array_equal(made.offset, made.weights)
  made = design("y ~ x + (1 | g)", data | {"x": np.ma.array(data["x"], mask=mask)})
  np.testing.assert_array_equal(made.fixed[:, 1], data["x"][7:])


def test_expressions_keep_the_means_of_the_fit(data):
  """Those of the rows that the model uses, without the rows that have no trials."""
  z = data["body weight"]
  n = np.where(np.arange(ROWS) < 9, 0, data["n"])
  more = data | {"z": z, "n": n, "k": np.minimum(n, np.arange(ROWS) % 4)}
  text = "k ~ x + offset(2 * center(z)) + (1 | g)"
  options = {"trials": "n", "offset": "scale(z)", "weights": "exp(center(z))"}
  made, template = prepare(text, more, family="logistic", **options)
  rest = z[9:]
  few = {name: list(values)[20:24] for name, values in more.items()}
  want = 2 * (z - rest.mean()) + (z - rest.mean()) / rest.std(ddof=1)
  again = new_rows(template, few)
  np.testing.assert_allclose(made.offset, want[9:])
  np.testing.assert_allclose(again.offset, want[20:24])
  np.testing.assert_allclose(made.weights, np.exp(rest - rest.mean()))
  np.testing.assert_allclose(again.weights, np.exp(z - rest.mean())[20:24])


@pytest.mark.parametrize("unit", ("D", "s", "ns"))
def test_dates_are_groups_and_levels_and_no_numbers(data, unit):
  days = (np.datetime64("2024-02-28") + np.arange(ROWS) // 20).astype(f"datetime64[{unit}]")
  for column, first in ((days, "2024-02-28"), (days - days[0], "0 days")):
    more = data | {"day": column}
    assert design("y ~ x + (1 | day)", more).random[0].levels[0] == first
    with pytest.raises(ValueError, match=rf"'day' has dates or durations, such as '{first}'.*C\("):
      design("y ~ day + (1 | g)", more)
  assert design("y ~ C(day) + (1 | g)", data | {"day": days}).fixed_names[2] == (
    "C(day)[T.2024-03-01]"
  )
  days[3] = np.datetime64("NaT")
  assert design("y ~ (1 | day)", data | {"day": days}).dropped == (("day is missing", 1),)


def test_small_integers_do_not_wrap():
  """Columns of 8 bits, as compact files have them: 120 times 2 is 240."""
  a, b = np.array([120, 100, 127, 3], np.int8), np.array([2, 3, 1, 2], np.uint8)
  data = {"y": np.arange(4.0), "a": a, "b": b, "g": list("uuvv")}
  found = design("y ~ a:b + I(a**2) + I(b - a) + (1 | g)", data)
  x, z = a.astype(float), b.astype(float)
  columns = dict(zip(found.fixed_names, found.fixed.T, strict=True))
  np.testing.assert_array_equal(columns["a:b"], x * z)
  np.testing.assert_array_equal(columns["I(a^2)"], x**2)
  np.testing.assert_array_equal(columns["I(b - a)"], z - x)


def test_one_number_is_that_of_every_row(data):
  made = design(
    "n ~ x + (1 | g)", data, family="logistic", weights=2, trials=9, offset=np.float64(0.5)
  )
  for got, want in ((made.weights, 2), (made.trials, 9), (made.offset, 0.5)):
    np.testing.assert_array_equal(got, np.full(ROWS, want))


def test_a_text_among_numbers_can_be_a_level(data):
  more = data | {"size": ["3+", "1", "2"] * 20}
  assert design("y ~ C(size) + (1 | g)", more).fixed_names[1:] == ("C(size)[T.2]", "C(size)[T.3+]")
  assert len(design("y ~ x + (1 | size)", more).random[0].levels) == 3


def test_texts_of_digits_are_levels_unless_they_stand_in_a_file(data, tmp_path):
  doses = np.array(["0", "1", "10"] * 20)
  frame = pd.DataFrame(data).assign(dose=doses)
  for column in (
    doses,
    list(doses),
    doses.astype("S"),
    frame["dose"],
    frame["dose"].astype(object),
  ):
    made, template = prepare("y ~ dose + (1 | g)", data | {"dose": column})
    assert made.fixed_names[1:] == ("dose[T.1]", "dose[T.10]")
    np.testing.assert_array_equal(made.fixed[:, 2], doses == "10")
    new = {"dose": [10, 1, 0], "g": [0, 0, 0]}  # the labels of a number and of its digits are equal
    np.testing.assert_array_equal(new_rows(template, new).fixed[:, 2], [1, 0, 0])
  assert design("y ~ as.numeric(dose) + (1 | g)", frame).fixed_names[1:] == ("as.numeric(dose)",)
  frame.to_csv(tmp_path / "doses.csv", index=False)
  made = design("y ~ dose + (1 | g)", tmp_path / "doses.csv")
  assert made.fixed_names[1:] == ("dose",)
  np.testing.assert_array_equal(made.fixed[:, 1], doses.astype(float))


@pytest.mark.parametrize(
  "numbers", ([2**56 * i for i in range(ROWS)], [Decimal(i) / 4 for i in range(ROWS)])
)
def test_numbers_that_are_no_floats_stay_numbers(data, numbers):
  made = design("y ~ d + (1 | g)", data | {"d": numbers})
  assert made.fixed_names[1:] == ("d",)
  np.testing.assert_array_equal(made.fixed[:, 1], np.array(numbers, float))


def test_a_response_of_digits_is_numbers_or_two_levels(data):
  digits = np.array(["1", "2"] * 30)
  np.testing.assert_array_equal(
    design("d ~ x + (1 | g)", data | {"d": digits}).response, digits.astype(float)
  )
  made = design("d ~ x + (1 | g)", data | {"d": digits}, family="logistic")
  np.testing.assert_array_equal(made.response, digits == "2")
  with pytest.raises(ValueError, match="two values; 'd' has '0', '1', '2'"):
    design("d ~ x + (1 | g)", data | {"d": ["0", "1", "2"] * 20}, family="logistic")


@pytest.mark.parametrize(
  "level",
  ("12:30", "a`b", "yes (all", "no)", "], [", "C:\\new", "a\nb", "it's", 'a"b', "`) + q + (`"),
)
def test_a_quoted_text_may_have_any_sign(data, level):
  t = np.array([level, "b", "c"] * 20)
  quoted = f"'{level}'" if '"' in level else f'"{level}"'
  for term in (f"I(t == {quoted})", f"C(t, levels=['b', {quoted}, 'c'])"):
    made, template = prepare(f"y ~ {term} + (1 | g)", data | {"t": t})
    np.testing.assert_array_equal(made.fixed[:, 1], t == level)
    again = new_rows(template, {"t": t[:6], "g": data["g"][:6]})
    np.testing.assert_array_equal(again.fixed, made.fixed[:6])
    if "\\" not in level and "\n" not in level:
      assert level in made.fixed_names[1]


def test_a_level_that_looks_like_an_escape_keeps_its_name(data):
  made = design("y ~ t + (1 | g)", data | {"t": np.array(["a", "(", r"\x28"] * 20)})
  assert made.fixed_names[1:] == (r"t[T.\x28]", "t[T.a]")


@pytest.mark.parametrize(
  "term", ("I(t == '12:30')", "C(t, levels=['12:10', '12:20', '12:30'])", "`z:z`")
)
def test_a_colon_in_a_name_makes_no_interaction(data, term):
  more = data | {"t": ["12:10", "12:20"] * 30, "z:z": [0] * ROWS}
  with pytest.raises(ValueError, match=r"of the fixed part is 0 in all 60 rows; leave it out\."):
    design(f"y ~ {term} + (1 | g)", more)


def test_random_terms(data):
  made = design("y ~ x + (f || g) + (0 + x | g) + (1 | a/g)", data | {"g": data["g"]})
  groups = [(t.group, t.names, t.correlated, len(t.levels)) for t in made.random]
  assert groups == [
    ("g", ("(Intercept)", "f[T.b]", "f[T.c]"), False, 5),
    ("g", ("x",), True, 5),
    ("a", ("(Intercept)",), True, 2),
    ("a:g", ("(Intercept)",), True, 10),
  ]
  inner = made.random[3]
  assert inner.levels[:2] == ("2:0", "2:1") and inner.levels[-1] == "10:4"
  want = [f"{a}:{g}" for a, g in zip(data["a"], data["g"], strict=True)]
  assert [inner.levels[i] for i in inner.index] == want


def test_names_of_any_kind():
  rng = np.random.default_rng(1)
  names = ("body weight", "class", "log", "a.b", "C", "größe", "x-1")
  data = {name: rng.uniform(1, 2, 12) for name in names} | {
    "y": rng.normal(size=12),
    "lambda": ["a", "b"] * 6,
  }
  terms = "`body weight` + log(class) + log(log) + log(a.b) + C + sqrt(größe) + log(`x-1`)"
  made = design(f"y ~ {terms} + (1 | lambda)", data)
  assert made.fixed_names == ("(Intercept)", *terms.replace("`", "").split(" + "))
  np.testing.assert_allclose(made.fixed[:, 3], np.log(data["log"]))


def test_responses(data):
  made = design("log(`body weight`) ~ x + (1 | g)", data)
  np.testing.assert_allclose(made.response, np.log(data["body weight"]))
  rate = design("n / `body weight` ~ x + (1 | g)", data)
  np.testing.assert_allclose(rate.response, data["n"] / data["body weight"])
  yes = design("yes ~ x + (1 | g)", data, family="logistic")
  assert yes.response_name == "yes == 'Yes'"
  np.testing.assert_array_equal(yes.response, np.array(data["yes"]) == "Yes")
  no = design("I(yes == 'No') ~ x + (1 | g)", data, family="logistic")
  np.testing.assert_array_equal(no.response, 1 - yes.response)


def test_trials_weights_and_offsets(data):
  k = np.minimum(data["n"], np.arange(ROWS) % 4)
  data = data | {"k": k}
  one = design("cbind(k, n - k) ~ x + (1 | g)", data, family="logistic")
  two = design("k ~ x + (1 | g)", data, family="logistic", trials="n")
  for made in (one, two):
    np.testing.assert_array_equal(made.response, k)
    np.testing.assert_array_equal(made.trials, data["n"])
  made = design(
    "k ~ x + offset(log(n)) + offset(x) + (1 | g)", data, family="poisson",
    weights="1 / `body weight`^2", offset=np.arange(ROWS),
  )  # fmt: skip
  np.testing.assert_allclose(made.weights, data["body weight"] ** -2)
  np.testing.assert_allclose(made.offset, np.log(data["n"]) + data["x"] + np.arange(ROWS))
  assert made.fixed_names == ("(Intercept)", "x")
  none = design("cbind(k, n) ~ (1 | g)", data | {"n": np.where(k > 0, 1, 0)}, family="logistic")
  assert none.dropped == (("no trials", 15),) and len(none.response) == ROWS - 15


def test_rows_with_missing_values_are_dropped_and_counted():
  data = {
    "y": [1, 2, None, 4, 5, 6, 7],
    "x": ["1", "NA", "NA", "3", "5", "2", "1"],
    "g": ["a", "b", "c", "N/A", "a", "b", "b"],
    "w": [1, 1, 1, 1, 1, 1, None],
    "unused": [None] * 7,
  }
  made = design("y ~ x + (1 | g)", data, weights="w")
  assert made.dropped == (("y is missing", 1), ("x is missing", 1), ("w is missing", 1),
                          ("g is missing", 1))  # fmt: skip
  assert made.response.tolist() == [1, 5, 6] and made.random[0].levels == ("a", "b")
  with pytest.raises(ValueError, match="No row of the table is complete, 7 rows: y is missing: 1"):
    design("y ~ unused + (1 | g)", data)


def test_new_rows_have_the_columns_of_the_fit(data):
  text = "y ~ poly(x, 2) + scale(`body weight`) * f + C(year, Sum) + yes + offset(x) + (f || a/g)"
  made, template = prepare(text, data, offset="n")
  few = {name: list(values)[5:9] for name, values in data.items() if name != "y"}
  again = new_rows(template, few)
  np.testing.assert_allclose(again.fixed, made.fixed[5:9], atol=1e-12)
  np.testing.assert_allclose(again.offset, made.offset[5:9])
  for term, columns, group in zip(made.random, again.columns, again.groups, strict=True):
    np.testing.assert_allclose(columns, term.columns[5:9])
    np.testing.assert_array_equal(group, term.index[5:9])
  few["a"] = [2, None, 77, 10]
  assert new_rows(template, few).groups[0].tolist() == [0, -1, -2, 1]
  del few["g"]
  assert new_rows(template, few).groups[1].tolist() == [-1] * 4
  with pytest.raises(ValueError, match="level 'q', which the data of the fit do not have.*a, b, c"):
    new_rows(template, few | {"f": ["a", "q", "a", "a"]})
  with pytest.raises(ValueError, match="'x' is missing in row 2"):
    new_rows(template, few | {"x": [1.0, None, 1.0, 1.0]})
  _, template = prepare("y ~ x + (1 | g)", data, offset=np.arange(ROWS))
  with pytest.raises(ValueError, match="pass offset for the new rows"):
    new_rows(template, few)
  assert new_rows(template, few, offset=np.arange(4)).offset.tolist() == [0, 1, 2, 3]


def test_a_hundred_thousand_groups():
  import time

  rng = np.random.default_rng(2)
  g = rng.integers(0, 100_000, 200_000)
  data = {"y": rng.normal(size=200_000), "x": rng.normal(size=200_000), "g": [f"s{i}" for i in g]}
  begin = time.process_time()
  made = design("y ~ x + (x | g)", data)
  assert time.process_time() - begin < 5.0
  assert [made.random[0].levels[i] for i in made.random[0].index[:50]] == data["g"][:50]


@pytest.mark.parametrize(
  "text, options, message",
  (
    ("y ~ z + (1 | g)", {}, "no column 'z'.*60 rows"),
    ("y ~ bodyweight + (1 | g)", {}, "Did you mean 'body weight'"),
    ("y ~ X + (1 | g)", {}, "Did you mean 'x'"),
    ("y ~ x + (1 | h)", {}, "no column 'h' .the grouping factor."),
    ("q ~ x + (1 | h)", {}, "no column 'q' .the response."),
    ("y ~ x + (1 | g)", {"weights": "wt"}, "no column 'wt'"),
    ("y ~ x + (1 | g)", {"weights": "x"}, "weights must be above 0"),
    ("y ~ x + (1 | g)", {"weights": np.ones(3)}, r"weights has shape \(3,\)"),
    ("y ~ log(f) + (1 | g)", {}, r"Column 'f' .a term. is not numeric: 'c' in row 1.*C\("),
    ("f ~ x + (1 | g)", {}, "Column 'f' .the response. is not numeric"),
    ("f ~ x + (1 | g)", {"family": "logistic"}, "two values; 'f' has 'a', 'b', 'c'"),
    ("y ~ log(x) + (1 | g)", {}, r"log\(x\) is nan in row \d+"),
    ("y ~ x + (1 | one)", {}, "'one' has one level, 'k', in 60 rows"),
    ("one ~ x + (1 | g)", {"family": "logistic"}, "two values; 'one' has 'k'"),
    ("c ~ x + (1 | g)", {}, "'c' is 3 in all 60 rows; there is nothing to explain"),
    ("y ~ zero + (1 | g)", {}, "'zero' of the fixed part is 0 in all 60 rows"),
    ("y ~ (zero || g)", {}, r"'zero' of \(zero \|\| g\) is 0 in all 60 rows"),
    ("y ~ x + c + (1 | g)", {}, "depend on each other in 60 rows: 'c' is 3 in all"),
    ("y ~ (x + 1 | g) + (1 | g)", {}, "random effect .Intercept. by g is in two terms"),
    ("y ~ (0 | g)", {}, "has no term"),
    ("y ~ 2 + (1 | g)", {}, "'2' of the formula cannot be made: Numeric literals"),
    ("y ~ C(f, Treatment('q')) + (1 | g)", {}, "cannot be made: .*'q'.*not among"),
    ("y ~ C(f, levels=['a', 'b']) + (1 | g)", {}, "name all of them.*f has the levels .*'c'"),
    ("y ~ C(f, Treatment('q')) + (1 | g)", {}, "f has the levels 'a', 'b', 'c'"),
    ("y ~ x + one + (1 | g)", {}, "'one' has one level in 60 rows.*Leave it out"),
    ("y ~ x * one + (1 | g)", {}, "'one' has one level"),
    ("y ~ x + (one | g)", {}, "'one' has one level"),
    ("y ~ f * part + (1 | g)", {}, "do not occur together.*one column that names"),
    ("y ~ cr(x, df=3, constraints='none') + (1 | g)", {}, "options of cr must be numbers"),
    ("cbind(n, n) ~ x + (1 | g)", {}, "is a logistic response; the family is gaussian"),
    ("cbind(n, n) ~ x + (1 | g)", {"family": "logistic", "trials": "n"}, "leave out the arg"),
    ("cbind(n, x) ~ x + (1 | g)", {"family": "logistic"}, "among the terms"),
    ("cbind(n, y) ~ x + (1 | g)", {"family": "logistic"}, "must be at least 0; a row is negative"),
    (
      "y ~ slip + (1 | g)",
      {},
      r"'slip' has 'lost' in row 1 among numbers.*na=\['lost'\].*C\(slip\)",
    ),
    ("y ~ x + (1 | colon:tail)", {}, "would both be called 'a:b:c'"),
  ),
)
def test_errors_name_column_and_rows(data, text, options, message):
  more = {
    "one": ["k"] * ROWS, "part": ["u", "v", "v"] * 20, "c": [3] * ROWS, "zero": [0] * ROWS,
    "slip": ["lost", *map(str, range(ROWS - 1))],
    "colon": ["a:b", "a"] * 30, "tail": ["c", "b:c"] * 30,
  }  # fmt: skip
  with pytest.raises(ValueError, match=message):
    design(text, data | more, **options)


def test_a_file_is_a_table(tmp_path):
  path = tmp_path / "bees.csv"
  path.write_text("y;x;hive\n1,5;TRUE;007\n2;FALSE;007\n3;TRUE;08\n2,5;FALSE;08\n")
  made = design("y ~ x + (1 | hive)", path)
  assert made.fixed_names[1] == "x[T.TRUE]" and made.random[0].levels == ("007", "08")
  assert made.response.tolist() == [1.5, 2.0, 3.0, 2.5]
  with pytest.raises(ValueError, match="log.y. is -inf in row 2 .line 3 of zero.csv."):
    path = tmp_path / "zero.csv"
    path.write_text("y,g\n1,a\n0,b\n3,a\n")
    design("log(y) ~ (1 | g)", read(path))


def test_without_formulaic_the_error_says_what_to_install(data, monkeypatch):
  monkeypatch.setitem(sys.modules, "formulaic", None)
  with pytest.raises(ImportError, match=r"pip install 'shrinkmeta\[mixed\]'"):
    design("y ~ x + (1 | g)", data)
