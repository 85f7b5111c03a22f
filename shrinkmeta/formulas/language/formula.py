"""Parse a formula into its response, its fixed part, its random terms and its offsets.

    Reaction ~ Days + (Days | Subject)              correlated intercept and slope
    y ~ scale(x) * f + (x || g) + (1 | school/class)
    cbind(dead, alive) ~ log(dose) + (1 | batch)
    count ~ x + offset(log(days)) + (1 | site)

This file parses the random terms. The package formulaic parses the fixed part and the terms to the
left of a bar. In these parts `_c0_`, `_c1_`, ... stand for the names of the columns.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from shrinkmeta.formulas.language import functions
from shrinkmeta.formulas.language.tokens import Token, closing, split, tokenise, top

INTERCEPT = "(Intercept)"
_CONSTANTS = {"TRUE": "True", "FALSE": "False", "True": "True", "False": "False"}


class Random(NamedTuple):
  """A parsed random term, such as (x | g)."""

  terms: str  # left of the bar, for formulaic
  group: tuple[str, ...]  # columns whose combinations are the groups
  correlated: bool
  text: str  # as written


class Formula(NamedTuple):
  """A parsed formula.

  In the texts of the parts, `_c0_` and `_t0_` both stand for the column `columns[0]`. `_t0_` always
  reads the column as levels.
  """

  text: str
  response: str  # how it is written
  responses: tuple[str, ...]  # one expression; two of cbind(successes, failures)
  fixed: str
  random: tuple[Random, ...]
  offsets: tuple[str, ...]
  columns: tuple[str, ...]
  numeric: frozenset[str]  # columns that a function takes as numbers


def parse(text: str) -> Formula:
  """Parse a formula.

  Args:
    text: a formula with one ~ and at least one random term.

  Returns:
    The parts of the formula. Nested groups are expanded: `(1 | a/b)` becomes
    `(1 | a) + (1 | a:b)`.

  Raises:
    ValueError: the formula cannot be read, has no random term, or calls a function that is not in
      `functions.FUNCTIONS`. The message names the part and says what to write.
    TypeError: the formula is not a string.

  >>> formula = parse("y ~ x + (1 | school/class)")
  >>> [":".join(term.group) for term in formula.random]
  ['school', 'school:class']
  """
  if not isinstance(text, str):
    raise TypeError(f"A formula is a text such as 'y ~ x + (1 | g)'; got {type(text).__name__}.")
  return _Parser(text).formula()


def expression(text: str) -> Formula:
  """Parse an expression such as "log(days)".

  Args:
    text: a column, a function call, or arithmetic with columns and calls.

  Returns:
    A Formula whose only part is the expression, in `responses`.

  Raises:
    ValueError: the expression cannot be read, or calls a function that is not in
      `functions.FUNCTIONS`.

  >>> expression("log(days)").responses
  ('log(_c0_)',)
  """
  parser = _Parser(text)
  value = parser.value(parser.tokens)
  return Formula(
    text, text, (value,), "0", (), (), tuple(parser.columns), frozenset(parser.numeric)
  )


class _Parser:
  """The columns of one formula, as they are met."""

  def __init__(self, text: str):
    self.text = text
    self.tokens = tokenise(text)
    self.columns: list[str] = []
    self.numeric: set[str] = set()
    self.fixed: list[str] = []
    self.random: list[Random] = []
    self.offsets: list[str] = []

  def formula(self) -> Formula:
    sides = split(self.tokens, ("~",))
    if len(sides) != 2 or not sides[0][1]:
      equals = len(sides) == 1 and any(token.text == "=" for token in self.tokens)
      hint = " Write ~ in place of =." if equals else ""
      raise ValueError(
        f"The formula {self.text!r} must have one ~ between response and terms, as in "
        f"y ~ x + (1 | g).{hint}"
      )
    left, right = sides[0][1], sides[1][1]
    responses = self.response(left)
    used = list(self.columns)
    for sign, term in split(right, ("+", "-")):
      self.term(sign, term)
    fixed, random, offsets = self.fixed, self.random, self.offsets
    if not random:
      raise ValueError(
        f"The formula {self.text!r} has no random term, such as (1 | group). Without one, an "
        "ordinary regression is enough."
      )
    groups = {name for term in random for name in term.group}
    right_side = " ".join([*fixed, *(r.terms for r in random), *offsets])
    for i, name in enumerate(used):
      if re.search(f"_[ct]{i}_", right_side) or name in groups:
        raise ValueError(
          f"The response {name!r} is among the terms of {self.text!r}; a response cannot predict "
          "itself. Leave it out on the right of ~."
        )
    names = tuple(self.columns) + tuple(
      dict.fromkeys(n for r in random for n in r.group if n not in self.columns)
    )
    parts = (
      " ".join(fixed).removeprefix("+ ") or "1",
      tuple(random),
      tuple(offsets),
      names,
      frozenset(self.numeric),
    )
    response = left[0].text.strip("`") if len(left) == 1 else self.written(left)
    return Formula(self.text, response, responses, *parts)

  def written(self, tokens: Sequence[Token]) -> str:
    """How the user writes a part."""
    return self.text[tokens[0].start : tokens[-1].start + len(tokens[-1].text)]

  def response(self, left: Sequence[Token]) -> tuple[str, ...]:
    if left[0].text == "cbind" and len(left) > 1 and left[1].text == "(":
      parts = split(left[2:-1], (",",))
      if left[-1].text != ")" or len(parts) != 2 or not all(part for _, part in parts):
        raise ValueError(
          f"{self.written(left)!r} must be cbind(successes, failures), two columns of counts."
        )
      return tuple(self.value(part) for _, part in parts)
    return (self.value(left),)

  def term(self, sign: str, term: Sequence[Token]) -> None:
    """Add one signed term of the right side to the part that it belongs to."""
    if not term:
      if sign:
        raise ValueError(f"{self.text!r} has a {sign} with nothing after it.")
      return
    written = self.written(term)
    whole = closing(term, 0) == len(term) - 1 if term[0].text == "(" else False
    bars = [t for t in (top(term[1:-1]) if whole else ()) if t.text in ("|", "||")]
    if bars:
      if sign == "-":
        raise ValueError(f"A random term cannot be subtracted: - {written} in {self.text!r}.")
      for found in self.varying(term[1:-1], written):
        if any(found[:3] == other[:3] for other in self.random):
          raise ValueError(f"{self.text!r} has a random term twice: {found.text}. Leave one out.")
        self.random.append(found)
    elif any(t.text in ("|", "||") for t in term):
      raise ValueError(
        f"{written!r} is not one term: a random term stands in parentheses of its own and is "
        "joined by +, as in y ~ x + (1 | g)."
      )
    elif term[0].text == "offset" and len(term) > 1 and closing(term, 1) == len(term) - 1:
      if sign == "-":
        raise ValueError(f"Write offset(-({self.written(term[2:-1])})) in place of - {written}.")
      self.offsets.append(self.value(term[2:-1]))
    else:
      self.fixed += [sign or "+", self.terms(term)]

  def varying(self, inside: Sequence[Token], written: str) -> list[Random]:
    sides = split(inside, ("|", "||"))
    if len(sides) != 2:
      raise ValueError(f"{written} has more than one bar; write (terms | group).")
    bar, group = sides[1]
    if not sides[0][1] or not group:
      raise ValueError(f"{written} needs terms left and a group right of its bar, as (1 | g).")
    for token in top(group):
      if token.kind == "op" and token.text in "+*-":
        raise ValueError(
          f"{written} has the groups {self.written(group)!r}. Write one random term for each, as "
          "in (1 | a) + (1 | b), or (1 | a:b) for their combinations, or (1 | a/b) for b within a."
        )
    nested, found = (), []
    for _, part in split(group, ("/",)):
      nested = (*nested, *(self.group(names, written) for _, names in split(part, (":",))))
      found.append(nested)
    parts = split(sides[0][1], ("+", "-"))
    lost = [sign for sign, part in parts if sign and not part]
    if lost:
      raise ValueError(f"{written} has a {lost[0]} with nothing after it.")
    signed = [(sign, part) for sign, part in parts if part]
    terms = " ".join(f"{sign} {self.terms(part)}" for sign, part in signed).strip()
    text = f"{self.written(sides[0][1])} {bar} "
    return [Random(terms, names, bar == "|", f"({text}{':'.join(names)})") for names in found]

  def group(self, tokens: Sequence[Token], written: str) -> str:
    """The column of a grouping factor, `g` or `factor(g)`."""
    if len(tokens) == 4 and functions.is_levels(tokens[0].text) and tokens[1].text == "(":
      tokens = tokens[2:3]
    if len(tokens) != 1 or tokens[0].kind not in ("name", "tick"):
      raise ValueError(
        f"{self.written(tokens)!r} is not a grouping factor of {written}: a group is a column of "
        "the table, g, or combinations of columns, a:b or a/b."
      )
    return tokens[0].text.strip("`")

  def terms(self, tokens: Sequence[Token]) -> str:
    """The text of fixed terms: operators as they are, columns renamed, calls checked."""
    parts, i = [], 0
    while i < len(tokens):
      token = tokens[i]
      called = i + 1 < len(tokens) and tokens[i + 1].text == "("
      if token.kind == "name" and called:
        end = closing(tokens, i + 1)
        parts.append(self.value(tokens[i : end + 1]))
        i = end + 1
        continue
      if token.text == ".":
        raise ValueError(f"{self.text!r}: name the columns; '.' for all of them is not understood.")
      if token.kind == "string" or token.text in (
        "=",
        "==",
        "!=",
        "<",
        ">",
        "<=",
        ">=",
        "[",
        "]",
        ",",
      ):
        raise ValueError(
          f"{token.text} in {self.text!r} stands outside of a function. Write I(...) around a "
          f"computation or a comparison, as in y ~ I(x > 3) + (1 | g)."
        )
      parts.append(self.alias(token) if token.kind in ("name", "tick") else token.text)
      i += 1
    return " ".join(parts)

  def alias(self, token: Token) -> str:
    name = token.text.strip("`")
    if name not in self.columns:
      self.columns.append(name)
    return f"_c{self.columns.index(name)}_"

  def value(self, tokens: Sequence[Token]) -> str:
    """One expression, checked: a column, a call, or arithmetic, which becomes I(...)."""
    if not tokens:
      raise ValueError(f"{self.text!r} has an empty expression.")
    if len(tokens) == 1 and tokens[0].kind in ("name", "tick"):
      return self.alias(tokens[0])
    text, open_calls = "", []
    for i, token in enumerate(tokens):
      following = tokens[i + 1].text if i + 1 < len(tokens) else ""
      named = token.kind in ("name", "tick")
      if token.text == "(":
        open_calls.append(tokens[i - 1].text if i and tokens[i - 1].kind == "name" else "")
      elif token.text == ")":
        open_calls.pop()
      contrast = open_calls and functions.is_levels(open_calls[-1]) and tokens[i - 1].text != "("
      if token.kind == "name" and following == "(":
        text += functions.called(token.text, self.text)
      elif named and (following == "=" or contrast and functions.is_contrast(token.text)):
        text += token.text
      elif token.kind == "string":
        text += repr(token.text[1:-1])  # a backslash is a sign like any other
      elif named:
        text += _CONSTANTS.get(token.text) or self.alias(token)
      else:
        text += "**" if token.text == "^" else f" {token.text} "
    result, numeric = functions.checked(text, self.written(tokens), self.columns)
    self.numeric |= numeric
    return result
