"""Every public function documents its purpose, arguments and result; most show an example.

A docstring begins with one sentence on one line. The section "Args:" names every parameter, and the
section "Returns:" describes the result.
"""

import ast
import inspect
import pathlib
import re

import pytest

import shrinkmeta as sm

LEARNER_FUNCTIONS = (
  "init",
  "update",
  "adapt",
  "meta_gradient",
  "adapt_tasks",
  "no_start",
  "sums",
  "apply",
)
LEAST_EXAMPLES = 0.9  # share of the public functions that have one

# {rule: names whose docstrings break it today}. Delete a name as soon as its docstring is mended:
# the tests fail if a name no longer breaks the rule.
KNOWN_GAPS = {"summary": "", "args": "", "returns": "", "attributes": "", "example": ""}


def public_objects():
  """{name: function, property or class} of everything that users call by name."""
  learner = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
  found = {f"learner.{name}": getattr(learner, name) for name in LEARNER_FUNCTIONS}
  for name in sm.__all__:
    value = getattr(sm, name)
    if inspect.isclass(value) or inspect.isfunction(value):
      found[name] = value
    if inspect.isclass(value):
      for method, raw in vars(value).items():
        plain = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        own = getattr(raw if not isinstance(raw, property) else raw.fget, "__module__", "")
        is_method = inspect.isfunction(plain) or isinstance(raw, property)
        if not method.startswith("_") and is_method and own.startswith("shrinkmeta"):
          found[f"{name}.{method}"] = plain
    elif inspect.ismodule(value):
      own = lambda f, module=value: inspect.isfunction(f) and f.__module__ == module.__name__
      functions = {n: f for n, f in vars(value).items() if not n.startswith("_") and own(f)}
      listed = {n: getattr(value, n) for n in getattr(value, "__all__", functions)}
      found |= {f"{name}.{n}": f for n, f in listed.items() if inspect.isfunction(f)}
  return found


def sections(docstring):
  """{title: lines} of a docstring in Google's style; the text before the first title is ""."""
  title, found = "", {"": []}
  for line in inspect.cleandoc(docstring or "").splitlines():
    if match := re.fullmatch(r"([A-Z]\w+):", line):
      title = match.group(1)
      found[title] = []
    else:
      found[title].append(line)
  return found


def has_summary(thing):
  """The first line is one sentence with a period, and a blank line follows."""
  lines = inspect.cleandoc(thing.__doc__ or "").splitlines()
  if not lines or not lines[0].endswith("."):
    return False
  return not re.search(r"[.!?] +[A-Z`]", lines[0]) and (len(lines) == 1 or not lines[1])


def parameters(function):
  return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def names_arguments(function):
  """Every parameter stands before a colon in the section "Args:", alone or in a list."""
  entries = [
    re.match(r"  ([*\w, ]+):", line) for line in sections(function.__doc__).get("Args", [])
  ]
  named = {name.strip(" *") for entry in entries if entry for name in entry.group(1).split(",")}
  return set(parameters(function)) <= named


def says_what_returns(function):
  returned = inspect.signature(function).return_annotation
  if returned in (None, "None", inspect.Signature.empty):
    return True
  return any(line.strip() for line in sections(function.__doc__).get("Returns", []))


def names_fields(cls):
  """Every field of a record stands before a colon in the section "Attributes:"."""
  fields = getattr(cls, "_fields", getattr(cls, "__dataclass_fields__", ()))
  entries = [re.match(r"  (\w+):", line) for line in sections(cls.__doc__).get("Attributes", [])]
  return {name for name in fields if not name.startswith("_")} <= {e[1] for e in entries if e}


def has_example(function):
  return ">>>" in (function.__doc__ or "")


RULES = {
  "summary": has_summary,
  "args": names_arguments,
  "returns": says_what_returns,
  "attributes": names_fields,
}
OBJECTS = public_objects()
FUNCTIONS = {name: f for name, f in OBJECTS.items() if callable(f) and not inspect.isclass(f)}
CLASSES = {name: cls for name, cls in OBJECTS.items() if inspect.isclass(cls)}


def gaps_of(rule):
  return set(KNOWN_GAPS[rule].split())


@pytest.mark.parametrize("rule", RULES)
def test_docstrings_are_whole(rule):
  things = {"summary": OBJECTS, "attributes": CLASSES}.get(rule, FUNCTIONS)
  missing = {name for name, thing in things.items() if not RULES[rule](thing)}
  new, mended = sorted(missing - gaps_of(rule)), sorted(gaps_of(rule) - missing)
  assert not new, f"{rule}: missing or incomplete in {new}"
  assert not mended, f"{rule}: no gap any more, delete from KNOWN_GAPS: {mended}"


def test_most_functions_have_an_example():
  without = {name for name, function in FUNCTIONS.items() if not has_example(function)}
  mended = sorted(gaps_of("example") - without)
  assert not mended, f"example: no gap any more, delete from KNOWN_GAPS: {mended}"
  new = sorted(without - gaps_of("example"))
  most = (1 - LEAST_EXAMPLES) * len(FUNCTIONS)
  assert len(new) <= most, f"more than {most:.0f} of {len(FUNCTIONS)} have no example: {new}"


# docutils reads the description "N." as the start of a list, and the site then shows no text.
ENUMERATOR = re.compile(r"\(?(#|\d+|[A-Za-z]|[ivxlcdm]+|[IVXLCDM]+)[.)](\s|$)")


def enumerated(source):
  """The entries "name: text" in docstrings and comments whose text begins like a list."""
  trees = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
  lines = [line for tree in trees for line in (ast.get_docstring(tree) or "").splitlines()]
  entries = [re.match(r"  [*\w, ]+: (.*)", line) for line in lines]
  entries += [re.match(r"  \w+: [^#]*#\s*(.*)", line) for line in source.splitlines()]
  return [entry[0].strip() for entry in entries if entry and ENUMERATOR.match(entry[1])]


def test_no_description_is_read_as_a_list():
  files = pathlib.Path(inspect.getfile(sm)).parent.rglob("*.py")
  found = {path.name: enumerated(path.read_text(encoding="utf-8")) for path in files}
  assert not {name: entries for name, entries in found.items() if entries}
  poor = (
    'class A:\n  """B.\n\n  Attributes:\n    t: T.\n    k: k, a number.\n  """\n  n: int  # N.\n'
  )
  assert enumerated(poor) == ["t: T.", "n: int  # N."]


def test_gaps_name_rules_and_objects():
  assert set(KNOWN_GAPS) == {*RULES, "example"}
  for rule in KNOWN_GAPS:
    assert gaps_of(rule) <= set(OBJECTS)


def test_the_rules_see_what_is_missing():
  def whole(a: int, *rest: int, b: int = 0) -> int:
    """Add numbers.

    Args:
      a, b: two numbers.
      *rest: more numbers.

    Returns:
      The sum.

    >>> whole(1)
    1
    """
    return a + b + sum(rest)

  def poor(a: int, b: int) -> int:
    """Add. Twice
    over.

    Args:
      a: a number, and b: another.
    """
    return a + b

  for rule in (has_summary, names_arguments, says_what_returns, has_example):
    assert rule(whole) and not rule(poor)
