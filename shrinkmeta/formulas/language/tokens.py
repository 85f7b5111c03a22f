"""Split a formula into tokens: names, numbers, strings and operators."""

import re
from collections.abc import Sequence
from typing import NamedTuple

_TOKEN = re.compile(
  r"""(?P<space>\s+)|(?P<tick>`[^`]+`)|(?P<string>"[^"]*"|'[^']*')
  |(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
  |(?P<name>(?:[^\W\d]|\.(?!\d))[\w.]*)
  |(?P<op>\*\*|\|\||==|!=|<=|>=|%in%|[-+*/:^~|(),=<>\[\]])""",
  re.X,
)


class Token(NamedTuple):
  """A token of a formula.

  Attributes:
    kind: "name", "tick" (a name in backticks), "number", "string" or "op".
    text: the characters of the token.
    start: the position of its first character in the formula.
  """

  kind: str
  text: str
  start: int


def tokenise(text: str) -> list[Token]:
  """Split a formula into tokens.

  Args:
    text: the formula.

  Returns:
    The tokens, without spaces.

  Raises:
    ValueError: the formula has a character that is not allowed, or its parentheses do not match.

  >>> [token.text for token in tokenise("y ~ log(x)")]
  ['y', '~', 'log', '(', 'x', ')']
  """
  found, at = [], 0
  while at < len(text):
    match = _TOKEN.match(text, at)
    if not match:
      hint = "; names with other signs stand in backticks, `like this`" if text[at] != "`" else ""
      raise ValueError(f"{text[at]!r} in the formula {text!r} is not understood{hint}.")
    if match[0] == "%in%":
      # In R it is the interaction alone, in other packages it includes the main effect of f.
      raise ValueError(
        f"%in% in the formula {text!r} is not understood. In place of x %in% f write f:x, or f/x "
        "for f and f:x."
      )
    if match.lastgroup != "space":
      found.append(Token(str(match.lastgroup), match[0], at))
    at = match.end()
  depth = 0
  for token in found:
    depth += (token.text in ("(", "[")) - (token.text in (")", "]"))
    if depth < 0:
      break
  if depth:
    raise ValueError(f"The parentheses of {text!r} do not match.")
  return found


def top(tokens: Sequence[Token]) -> list[Token]:
  """Return the tokens outside of all parentheses.

  Args:
    tokens: the tokens.

  Returns:
    The tokens at depth 0, and the outermost parentheses.
  """
  depth, found = 0, []
  for token in tokens:
    depth -= token.text in (")", "]")
    if not depth:
      found.append(token)
    depth += token.text in ("(", "[")
  return found


def split(tokens: Sequence[Token], at: tuple[str, ...]) -> list[tuple[str, list[Token]]]:
  """Split tokens at operators that are outside of all parentheses.

  Args:
    tokens: the tokens.
    at: the operators.

  Returns:
    A list of parts. Each part is (the operator before it, its tokens). The operator of the first
    part is "".
  """
  parts: list[tuple[str, list[Token]]] = [("", [])]
  depth = 0
  for token in tokens:
    depth += (token.text in ("(", "[")) - (token.text in (")", "]"))
    if not depth and token.kind == "op" and token.text in at:
      parts.append((token.text, []))
    else:
      parts[-1][1].append(token)
  return parts


def closing(tokens: Sequence[Token], opening: int) -> int:
  """Find the closing parenthesis that matches an opening one.

  Args:
    tokens: the tokens.
    opening: the index of the opening parenthesis.

  Returns:
    The index of the closing parenthesis. It is the number of tokens if there is none.
  """
  depth = 0
  for i in range(opening, len(tokens)):
    depth += (tokens[i].text in ("(", "[")) - (tokens[i].text in (")", "]"))
    if not depth:
      return i
  return len(tokens)
