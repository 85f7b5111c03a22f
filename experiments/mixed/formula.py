"""The part of the formula language that is fitted: independent random terms, one grouping factor.

Reaction ~ Days + (Days || Subject)      random intercept and slope, not correlated
log_radon ~ floor + (1 | county)         random intercept
y ~ 0 + x + (0 + x | g)                  without intercepts
"""

import re
from typing import NamedTuple

INTERCEPT = "(Intercept)"
SUPPORTED = (
  "Supported: response ~ column + column + (column || group), with columns joined by +, 0 or 1 for "
  "the intercept, and one grouping factor; (1 | group) and (0 + x | group) too."
)


class Formula(NamedTuple):
  """A formula taken apart; INTERCEPT stands for the column of ones."""

  response: str
  fixed: tuple[str, ...]
  random: tuple[str, ...]
  group: str


def parse(text: str) -> Formula:
  """Raises ValueError that names the term which is not supported.

  >>> parse("Reaction ~ Days + (Days || Subject)").random
  ('(Intercept)', 'Days')
  """
  sides = text.split("~")
  if len(sides) != 2:
    raise ValueError(f"{text!r} must have one ~ between response and terms. {SUPPORTED}")
  response, right = sides[0].strip(), sides[1]
  _check_name(response, "response")
  groups, random = [], []
  for term in re.split(r"\+(?![^()]*\))", right):
    if "(" in term and not re.fullmatch(r"\s*\([^()]*\)\s*", term):
      raise ValueError(f"{term.strip()!r} is not one term; join terms by +. {SUPPORTED}")
  for inside in re.findall(r"\(([^()]*)\)", right):
    group, terms = _random(inside)
    groups.append(group)
    random += terms
  rest = re.sub(r"\([^()]*\|[^()]*\)", "", right)
  rest = "+".join(part for part in rest.split("+") if part.strip())
  fixed = _terms(rest or "1", "fixed part")
  if not random:
    raise ValueError(f"{text!r} has no random term, such as (1 | group). {SUPPORTED}")
  if response in (*fixed, *random, *groups):
    raise ValueError(f"The response {response!r} is among the terms of {text!r}.")
  if len(set(groups)) > 1:
    raise ValueError(f"{text!r} has several grouping factors, {sorted(set(groups))}. {SUPPORTED}")
  if len(set(random)) < len(random):
    raise ValueError(f"{text!r} has a random term twice: {random}. {SUPPORTED}")
  return Formula(response, fixed, tuple(random), groups[0])


def _random(inside: str) -> tuple[str, tuple[str, ...]]:
  """(group, terms) of what stands between the parentheses."""
  if "|" not in inside:
    raise ValueError(f"({inside}) is no random term: it has no |. {SUPPORTED}")
  independent = "||" in inside
  sides = inside.split("||" if independent else "|")
  if len(sides) != 2:
    raise ValueError(f"({inside}) has more than one bar. {SUPPORTED}")
  group = sides[1].strip()
  if "/" in group or ":" in group:
    raise ValueError(f"({inside}) has a nested or crossed grouping factor, {group!r}. {SUPPORTED}")
  _check_name(group, f"grouping factor of ({inside})")
  terms = _terms(sides[0], f"({inside})")
  if not independent and len(terms) > 1:
    raise ValueError(
      f"({inside}) asks for correlated random terms {terms}, which are not supported; write "
      f"({sides[0].strip()} || {group}) for independent ones."
    )
  if not terms:
    raise ValueError(f"({inside}) has no term. {SUPPORTED}")
  return group, terms


def _terms(text: str, where: str) -> tuple[str, ...]:
  """Columns of a sum, the intercept first unless there is a 0."""
  intercept, columns = True, []
  for term in (part.strip() for part in text.split("+")):
    if term in ("0", "1"):
      intercept = term == "1"
    else:
      _check_name(term, f"term of {where}")
      columns.append(term)
  if len(set(columns)) < len(columns):
    raise ValueError(f"A column is named twice in {text.strip()!r}.")
  return ((INTERCEPT,) if intercept else ()) + tuple(columns)


def _check_name(name: str, what: str) -> None:
  if not re.fullmatch(r"[^\W\d][\w.]*|\.[\w.]*", name):
    raise ValueError(
      f"{name!r} ({what}) is not a column name; interactions, functions and numbers are not "
      f"supported. {SUPPORTED}"
    )
