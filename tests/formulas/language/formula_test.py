"""Parsed formulas; errors say what to write, and a formula cannot run code."""

import pytest

from shrinkmeta.formulas.language.formula import expression, parse


def terms(text):
  formula = parse(text)
  return [(":".join(r.group), r.terms, r.correlated) for r in formula.random]


@pytest.mark.parametrize(
  "text, columns, fixed, random",
  (
    ("y ~ x + (x || g)", "y x g", "_c1_", [("g", "_c1_", False)]),
    ("y ~ x + (x | g)", "y x g", "_c1_", [("g", "_c1_", True)]),
    ("y~1+(1|g)", "y g", "1", [("g", "1", True)]),
    ("y ~ (1 | g)", "y g", "1", [("g", "1", True)]),
    ("y ~ (x || g) + x", "y x g", "_c1_", [("g", "_c1_", False)]),
    ("y ~ 0 + x + z.1 + (0+x|g)", "y x z.1 g", "0 + _c1_ + _c2_", [("g", "0 + _c1_", True)]),
    ("y ~ x - 1 + (1 | g)", "y x g", "_c1_ - 1", [("g", "1", True)]),
    ("y ~ ähre + (1 | g)", "y ähre g", "_c1_", [("g", "1", True)]),
    ("y ~ `a b`:class + (1 | g)", "y|a b|class|g", "_c1_ : _c2_", [("g", "1", True)]),
    ("y ~ log (x) + (1 | factor(g))", "y x g", "log(_c1_)", [("g", "1", True)]),
  ),
)
def test_parts(text, columns, fixed, random):
  formula = parse(text)
  assert formula.columns == tuple(columns.split("|" if "|" in columns else None))
  assert (formula.fixed, terms(text)) == (fixed, random)


def test_nested_groups_are_expanded():
  assert [group for group, _, _ in terms("y ~ (x || a/b/c)")] == ["a", "a:b", "a:b:c"]
  assert [group for group, _, _ in terms("y ~ (1 | a:b)")] == ["a:b"]
  assert [group for group, _, _ in terms("y ~ (1 | a) + (1 | b)")] == ["a", "b"]  # crossed: legal


@pytest.mark.parametrize(
  "text, checked",
  (
    ("I(x^2)", "I(_c0_ ** 2)"),
    ("x / n", "I(_c0_ / _c1_)"),
    ("I(x)", "I(_c0_)"),
    ("poly(x, 2, raw=TRUE)", "poly(_c0_, 2, raw=True)"),
    ("C(f, Treatment('b'))", "C(_t0_, Treatment('b'))"),
    ("C(f, contr.treatment('b'))", "C(_t0_, contr.treatment('b'))"),
    ("C(Sum, Sum)", "C(_t0_, Sum)"),
    ('C(f, Treatment("it\'s"))', 'C(_t0_, Treatment("it\'s"))'),
    ("as.factor(f)", "C(_t0_)"),
    ('I(f == "b")', "I(_t0_ == 'b')"),
    ('I(f == "b (c")', r"I(_t0_ == 'b \x28c')"),
    (r'I(f == "C:\new")', r"I(_t0_ == 'C:\\new')"),
    ("log(`body weight` + 1)", "log(_c0_ + 1)"),
    ("as.numeric(log)", "as_numeric(_c0_)"),
    ("scale(x, center=FALSE)", "scale(_c0_, center=False)"),
  ),
)
def test_expressions_for_formulaic(text, checked):
  assert expression(text).responses == (checked,)


def test_a_response_of_two_columns_and_offsets():
  formula = parse("cbind(dead, n - dead) ~ x + offset(log(days)) + (1 | g)")
  assert formula.responses == ("_c0_", "I(_c1_ - _c0_)") and formula.response[:6] == "cbind("
  assert formula.offsets == ("log(_c3_)",) and formula.fixed == "_c2_"


@pytest.mark.parametrize(
  "text, message",
  (
    ("y + x", "one ~"),
    ("y = x + (1 | g)", "Write ~ in place of ="),
    ("y ~ x", "no random term, such as"),
    ("y ~ x | g", r"'x \| g' is not one term: .* parentheses of its own"),
    ("y ~ x (1 | g)", r"'x \(1 \| g\)' is not one term"),
    ("y ~ (1 | g)(0 + x | g)", "is not one term"),
    ("y ~ x*(1 | g)", "is not one term"),
    ("y ~ y + (1 | g)", "response 'y' is among the terms"),
    ("y ~ log(y) + (1 | g)", "response 'y' is among the terms"),
    ("y ~ x + (1 | y)", "response 'y' is among the terms"),
    ("y ~ x + (1 | a + b)", r"\(1 \| a\) \+ \(1 \| b\)"),
    ("y ~ x + (1 | a * b)", r"\(1 \| a:b\)"),
    ("y ~ x + (1 | sqrt(g))", "'sqrt.g.' is not a grouping factor"),
    ("y ~ x + (1 || g || h)", "more than one bar"),
    ("y ~ x + (| g)", "needs terms left"),
    ("y ~ x + (1 | g) + (1 | g)", "twice"),
    ("y ~ x - (1 | g)", "cannot be subtracted"),
    ("y ~ x + (1 | g) +", r"a \+ with nothing after it"),
    ("y ~ x + (1 | g", "parentheses"),
    ("y ~ . + (1 | g)", "name the columns"),
    ("y ~ x > 3 + (1 | g)", r"I\(x > 3\)"),
    ("y ~ x; z + (1 | g)", "';'.*backticks"),
    ("y ~ x %in% f + (1 | g)", "%in%.*write f:x, or f/x"),
    ("y ~ (x %in% f | g)", "%in%.*write f:x, or f/x"),
    ("y ~ ns(x, 3) + (1 | g)", r"ns.*cr\(x, df=3\).*There are log,"),
    ("y ~ log(x, 10) + (1 | g)", "log takes one argument; log2"),
    ("y ~ np.log(x) + (1 | g)", r"np.log.*\(write log\)"),
    ("y ~ ifelse(x > 0, 1, 0) + (1 | g)", r"I\(x > 3\) is 1 where"),
    ("y ~ Q('a b') + (1 | g)", "stands in backticks"),
    ('y ~ C(f, levels=c("a", "b")) + (1 | g)', r'levels=\["b", "a"\]'),
    ("y ~ (x + | g)", r"\(x \+ \| g\) has a \+ with nothing after it"),
    ("y ~ I(x^z) + (1 | g)", "raise a column to a number"),
    ("y ~ C(f, Treatment('b'), 3) + (1 | g)", "write C.f., C.f, Treatment"),
    ("y ~ I(f + 'b') + (1 | g)", "only be compared"),
    ("y ~ log(offset(x)) + (1 | g)", "an offset is a term of its own"),
    ("cbind(a) ~ x + (1 | g)", "two columns of counts"),
  ),
)
def test_errors_say_what_to_write(text, message):
  with pytest.raises(ValueError, match=message):
    parse(text)


def test_what_is_no_text():
  with pytest.raises(TypeError, match="got int"):
    parse(3)


@pytest.mark.parametrize(
  "call",
  (
    "open('{path}', 'w')",
    "I(open('{path}', 'w'))",
    "I(log(x).__class__)",
    "I(__import__('os').mkdir('{path}'))",
    "np.savetxt('{path}', x)",
    "x.to_csv('{path}')",
    "C(f).values.tofile('{path}')",
    "C(f, open('{path}', 'w'))",
    "C(f, levels=open('{path}', 'w'))",
    "I([open('{path}', 'w') for i in x])",
    "I((lambda: open('{path}', 'w'))())",
    "scale(x, open('{path}', 'w'))",
    "scale(I(f == \"a' or open('{path}', 'w')\"))",
    "{{open('{path}', 'w')}}",
    "`x`[open('{path}', 'w')]",
    "log(x) if x else open('{path}', 'w')",
    "Q('x')",
    "I(9**9**9)",
  ),
)
def test_a_formula_runs_no_other_code(tmp_path, call):
  path = tmp_path / "harmless"
  text = call.format(path=path)
  for formula in (f"y ~ {text} + (1 | g)", f"{text} ~ x + (1 | g)", f"y ~ ({text} | g)"):
    with pytest.raises(ValueError):
      parse(formula)
  with pytest.raises(ValueError):
    expression(text)
  assert not path.exists()
