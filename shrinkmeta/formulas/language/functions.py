"""The functions that a formula may call, and the check that an expression calls no others.

formulaic evaluates an expression as Python code. So this file parses every expression with `ast`
first. An expression may contain only arithmetic with columns, comparisons, and calls of
`FUNCTIONS`. Anything else is an error, so a formula cannot run other code. The columns are called
`_c0_` or `_t0_` in these expressions, so a column may have any name in the table. `_c0_` holds
numbers, or levels if the column holds text. `_t0_` always holds levels.
"""

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shrinkmeta.formulas.values import label_of

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
  "log": np.log,
  "log2": np.log2,
  "log10": np.log10,
  "log1p": np.log1p,
  "exp": np.exp,
  "expm1": np.expm1,
  "sqrt": np.sqrt,
  "abs": np.abs,
  "sin": np.sin,
  "cos": np.cos,
  "floor": np.floor,
  "ceiling": np.ceil,
  "round": np.round,
  "as.numeric": lambda x: x,
}
_STATEFUL = ("poly", "scale", "center", "standardize", "bs", "cr", "cc")  # formulaic's own
_CENTRED = ("cr", "cc")  # their columns add up to 1, as the intercept is, unless they are centred
_CENTRE = ast.keyword("constraints", ast.Constant("center"))
CENTRE = f", {ast.unparse(_CENTRE)}"
_LEVELS = {"C": "C", "factor": "C", "as.factor": "C"}
_CONTRASTS = ("Treatment", "Sum", "Helmert", "Diff", "Poly", "contr.treatment", "contr.sum")
_CONTRASTS += ("contr.helmert", "contr.poly")
_REFERENCES = ("Treatment", "contr.treatment")  # their argument is a level
FUNCTIONS = (*_ELEMENTWISE, "I", *_STATEFUL, *_LEVELS, *_CONTRASTS)
_HINTS = {
  "ns": "natural splines are cr(x, df=3)",
  "s": "smooth terms are not fitted; bs(x, df=4) and cr(x, df=4) are splines of fixed degrees",
  "relevel": 'C(x, Treatment("b")) chooses the reference level',
  "ordered": "C(x, Poly) has polynomial contrasts",
  "ifelse": "I(x > 3) is 1 where x is above 3, and 0 elsewhere",
  "c": 'a list of levels is levels=["b", "a"]',
  "Q": "a name with spaces stands in backticks",
  "offset": "an offset is a term of its own, as in y ~ x + offset(log(days)) + (1 | g)",
  "cbind": "cbind(successes, failures) is a response",
  "diag": "independent random terms are (x || g)",
  "us": "correlated random terms are (x | g)",
  "Error": "a random intercept is (1 | g)",
}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_ALIAS = re.compile(r"_c\d+_")
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")  # as `ast.unparse` writes texts
_SIGNS = re.compile(r"[()\[\]`]")  # formulaic takes them for syntax, also within quotes
_ESCAPE = re.compile(r"\\\\|\\x([0-9a-f]{2})")  # a backslash, or one of these signs


def context() -> dict[str, Callable[..., Any]]:
  """Return the functions that formulaic applies to every number of a column.

  Returns:
    {name of the function in a checked expression: function}.
  """
  return {_python(name): function for name, function in _ELEMENTWISE.items()}


def is_levels(name: str) -> bool:
  """Tell whether a function reads its column as levels.

  Args:
    name: the name of the function, as users write it.

  Returns:
    True for C, factor and as.factor.
  """
  return name in _LEVELS


def is_contrast(name: str) -> bool:
  """Tell whether a name is a contrast, the second argument of `C`.

  Args:
    name: the name, as users write it.

  Returns:
    True for Treatment, Sum, ...
  """
  return name in _CONTRASTS


def called(name: str, formula: str) -> str:
  """Return the name of a function in a checked expression.

  Args:
    name: the name of the function, as users write it.
    formula: the whole formula, for the error message.

  Returns:
    The name, which is valid in Python: "as_numeric" for "as.numeric".

  Raises:
    ValueError: the function is not among `FUNCTIONS`.
  """
  if name not in FUNCTIONS:
    hint = f" ({_HINTS[name]})" if name in _HINTS else ""
    short = name.removeprefix("np.").removeprefix("numpy.")
    hint = f" (write {short})" if name != short and short in FUNCTIONS else hint
    raise ValueError(
      f"{name}(...) in {formula!r} is not a function of formulas{hint}. There are "
      f"{', '.join(FUNCTIONS)}. Compute anything else in a column of the table."
    )
  return name if name in _CONTRASTS else _LEVELS.get(name, _python(name))


def readable(text: str) -> str:
  """Return an expression that `checked` wrote with the signs of its quoted texts.

  Outside quotes, as in the label of a level, a backslash is a sign like any other.

  >>> print(readable(r"I(_c0_ == 'a\x28')[T.\x28]"))
  I(_c0_ == 'a(')[T.\x28]
  """
  sign = lambda m: chr(int(m[1], 16)) if m[1] else m[0]
  return _QUOTED.sub(lambda quoted: _ESCAPE.sub(sign, quoted[0]), text)


def checked(text: str, written: str, columns: Sequence[str]) -> tuple[str, set[str]]:
  """Check an expression, and translate it for formulaic.

  Args:
    text: the expression, with `_c0_`, `_c1_`, ... in place of the columns.
    written: the expression as the user wrote it, for the error message.
    columns: the names of the columns.

  Returns:
    The expression for formulaic, and the names of the columns that it reads as numbers. In a quoted
    text "\\x28" stands for "(", and so do the codes of the other `_SIGNS`.

  Raises:
    ValueError: the expression holds something other than arithmetic, comparisons and calls of
      `FUNCTIONS`.

  >>> checked("log(_c0_)", "log(x)", ["x"])
  ('log(_c0_)', {'x'})
  """
  try:
    tree = ast.parse(text.strip(), mode="eval").body
  except SyntaxError:
    raise ValueError(f"{written!r} is not an expression.") from None
  checker = _Checker(written, columns)
  body = checker.visit(tree)
  escaped = lambda sign: f"\\x{ord(sign[0]):02x}"
  result = _QUOTED.sub(lambda quoted: _SIGNS.sub(escaped, quoted[0]), ast.unparse(body))
  return result if isinstance(body, ast.Call | ast.Name) else f"I({result})", checker.numeric


class _Checker(ast.NodeTransformer):
  """Raises for every node that is not expected, by `generic_visit`."""

  def __init__(self, written: str, columns: Sequence[str]):
    self.written, self.columns = written, columns
    self.numeric: set[str] = set()

  def generic_visit(self, node: ast.AST) -> ast.AST:
    raise ValueError(
      f"{self.written!r} is not understood. A term is a column, or arithmetic, comparisons and "
      f"calls of {', '.join(FUNCTIONS)}."
    )

  def visit_Name(self, node: ast.Name) -> ast.AST:
    if not _ALIAS.fullmatch(node.id):
      self.generic_visit(node)
    self.numeric.add(self.columns[int(node.id[2:-1])])
    return node

  def visit_Constant(self, node: ast.Constant) -> ast.AST:
    if not isinstance(node.value, int | float):
      raise ValueError(
        f"The text {node.value!r} in {self.written!r} can only be compared with a column, as in "
        'I(f == "b"), or name a level, as in C(f, Treatment("b")).'
      )
    return node

  def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
    if not isinstance(node.op, ast.USub | ast.UAdd):
      self.generic_visit(node)
    return ast.UnaryOp(node.op, self.visit(node.operand))

  def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
    if not isinstance(node.op, _ARITHMETIC):
      self.generic_visit(node)
    if isinstance(node.op, ast.Pow):
      power = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
      columns = any(isinstance(n, ast.Name) for n in ast.walk(node.left))
      if not (isinstance(power, ast.Constant) and columns):
        raise ValueError(f"{self.written!r}: raise a column to a number, as in I(x^2).")
    return ast.BinOp(self.visit(node.left), node.op, self.visit(node.right))

  def visit_Compare(self, node: ast.Compare) -> ast.AST:
    sides = [node.left, *node.comparators]
    if any(map(_is_text, sides)):
      if len(sides) != 2 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
        self.generic_visit(node)
      return ast.Compare(self.levels(node.left), node.ops, node.comparators)
    return ast.Compare(self.visit(node.left), node.ops, [self.visit(n) for n in node.comparators])

  def visit_Call(self, node: ast.Call) -> ast.AST:
    name = ast.unparse(node.func)
    if name in _LEVELS.values():
      return self.factor(node)
    elementwise = name in map(_python, _ELEMENTWISE)
    rest = [*node.args[1:], *(k.value for k in node.keywords)]
    if not (elementwise or name in ("I", *_STATEFUL)) or not node.args:
      self.generic_visit(node)
    if rest and (elementwise or name == "I"):
      bases = "; log2(x) and log10(x) have other bases" if name == "log" else ""
      raise ValueError(f"{self.written!r}: {name} takes one argument{bases}.")
    if name in _STATEFUL and any(map(_is_text, ast.walk(node.args[0]))):
      # formulaic writes the text of such a call into code that it evaluates, quotes and all.
      raise ValueError(f"{self.written!r}: {name} takes numbers, not a comparison with a text.")
    keywords = node.keywords
    if name in _CENTRED:  # an expression that was checked before has the constraint
      keywords = [k for k in keywords if ast.unparse(k) != ast.unparse(_CENTRE)]
    rest = [*node.args[1:], *(k.value for k in keywords)]
    if not all(_is_literal(n, texts=False) for n in rest) or not all(k.arg for k in keywords):
      raise ValueError(f"{self.written!r}: the options of {name} must be numbers, TRUE or FALSE.")
    keywords = [*keywords, _CENTRE] if name in _CENTRED else keywords
    return ast.Call(node.func, [self.visit(node.args[0]), *node.args[1:]], keywords)

  def factor(self, node: ast.Call) -> ast.expr:
    """C(f), C(f, Sum), C(f, Treatment("b")), C(f, levels=["b", "a"])."""
    keywords = {k.arg: k.value for k in node.keywords}
    contrasts = [*node.args[1:], *(v for k, v in keywords.items() if k == "contrasts")]
    levels = [v for k, v in keywords.items() if k == "levels"]
    names = set(keywords) <= {"contrasts", "levels"} and len(contrasts) <= 1
    if not (names and node.args and all(map(_is_contrast, contrasts))
            and all(isinstance(v, ast.List) and _is_literal(v) for v in levels)):  # fmt: skip
      raise ValueError(
        f'{self.written!r}: write C(f), C(f, Treatment("b")), C(f, Sum) or C(f, levels=["b", "a"]).'
      )
    first = self.levels(node.args[0])
    named = [ast.keyword("levels", _labels(value)) for value in levels]
    return ast.Call(node.func, [first, *map(_reference, contrasts)], named)

  def levels(self, node: ast.AST) -> ast.expr:
    """The column as levels, whatever it holds."""
    if not (isinstance(node, ast.Name) and _ALIAS.fullmatch(node.id)):
      raise ValueError(f"{self.written!r}: only a column has levels, as in C(f).")
    return ast.Name(node.id.replace("c", "t"), ast.Load())


def _is_contrast(node: ast.AST) -> bool:
  if isinstance(node, ast.Call):
    values = [*node.args, *(k.value for k in node.keywords)]
    return ast.unparse(node.func) in _CONTRASTS and all(map(_is_literal, values))
  return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in _CONTRASTS


def _is_literal(node: ast.AST, texts: bool = True) -> bool:
  """A number, a text, or a list of them."""
  if isinstance(node, ast.List | ast.Tuple):
    return all(_is_literal(n, texts) for n in node.elts)
  if isinstance(node, ast.UnaryOp):
    return isinstance(node.op, ast.USub) and _is_literal(node.operand, False)
  kinds = int | float | str if texts else int | float
  return isinstance(node, ast.Constant) and isinstance(node.value, kinds)


def _reference(node: ast.expr) -> ast.expr:
  """A contrast whose reference level has its label; the numbers of other contrasts are options."""
  if not isinstance(node, ast.Call) or ast.unparse(node.func) not in _REFERENCES:
    return node
  named = [ast.keyword(k.arg, _labels(k.value)) for k in node.keywords]
  return ast.Call(node.func, [_labels(value) for value in node.args], named)


def _labels(node: ast.expr) -> ast.expr:
  """Literals as the labels of levels: "3" of 3 and of 3.0."""
  if isinstance(node, ast.List | ast.Tuple):
    return type(node)([_labels(n) for n in node.elts], node.ctx)
  value = ast.literal_eval(node)
  return ast.Constant(label_of(value) if isinstance(value, float) else str(value))


def _is_text(node: ast.AST) -> bool:
  return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _python(name: str) -> str:
  return name.replace(".", "_")
