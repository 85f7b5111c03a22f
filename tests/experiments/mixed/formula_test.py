"""Formulas that are understood, and errors that name the term of the others."""

import pytest

from experiments.mixed.formula import INTERCEPT, parse


@pytest.mark.parametrize(
  "text, fixed, random, group",
  (
    ("y ~ x + (x || g)", (INTERCEPT, "x"), (INTERCEPT, "x"), "g"),
    ("y~1+(1|g)", (INTERCEPT,), (INTERCEPT,), "g"),
    ("y ~ (1 | g)", (INTERCEPT,), (INTERCEPT,), "g"),
    ("y ~ 0 + x + z.1 + (0 + x | g)", ("x", "z.1"), ("x",), "g"),
    ("y ~ x + (1 | g) + (0 + x | g)", (INTERCEPT, "x"), (INTERCEPT, "x"), "g"),
    ("y ~ ähre + (1 | g)", (INTERCEPT, "ähre"), (INTERCEPT,), "g"),
    ("y ~ (x || g) + x", (INTERCEPT, "x"), (INTERCEPT, "x"), "g"),
  ),
)
def test_parsed(text, fixed, random, group):
  found = parse(text)
  assert (found.response, found.fixed, found.random, found.group) == ("y", fixed, random, group)


@pytest.mark.parametrize(
  "text, name",
  (
    ("y ~ x + (x | g)", r"\(x \| g\) asks for correlated"),
    ("y ~ x + (1 | a/b)", "'a/b'"),
    ("y ~ x + (1 | a:b)", "'a:b'"),
    ("y ~ x + (1 | a) + (1 | b)", r"\['a', 'b'\]"),
    ("y ~ x:z + (1 | g)", "'x:z'"),
    ("y ~ x*z + (1 | g)", r"'x\*z'"),
    ("y ~ x - 1 + (1 | g)", "'x - 1'"),
    ("y ~ log(x) + (1 | g)", r"'log\(x\)' is not one term"),
    ("y ~ x (1 | g)", r"'x \(1 \| g\)' is not one term"),
    ("y ~ (1 | g)(0 + x | g)", "is not one term"),
    ("y ~ y + (1 | g)", "'y' is among the terms"),
    ("y ~ (x) + (1 | g)", r"\(x\) is no random term"),
    ("log(y) ~ x + (1 | g)", r"'log\(y\)'"),
    ("y ~ x", "no random term"),
    ("y + x", "one ~"),
    ("y ~ x + (1 | g) + (1 | g)", "twice"),
    ("y ~ x + x + (1 | g)", "twice"),
    ("y ~ x + (1 || g || h)", "more than one bar"),
    ("y ~ x + (0 | g)", "has no term"),
    ("y ~ 2 + (1 | g)", "'2'"),
  ),
)
def test_not_supported(text, name):
  with pytest.raises(ValueError, match=name):
    parse(text)
