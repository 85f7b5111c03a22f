"""Rooms of experiments/ import the public library only, and each other without circles."""

import ast
import pathlib

import pytest

import shrinkmeta as sm

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments").rglob("*.py"))
APART = ("datasets", "networks", "settings")  # these know nothing of each other


def name_of(file: pathlib.Path) -> str:
  """experiments/runs/store.py -> experiments.runs.store; a package has the name of its folder."""
  parts = file.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}
PACKAGES = {name_of(file) for file in FILES if file.name == "__init__.py"}


def parse(module: str) -> ast.Module:
  return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[tuple[str, str]]:
  """(module, name imported from it, or "") of every import, wherever it stands in the file."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {(alias.name, "") for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "imports are absolute"
      found |= {(node.module or "", alias.name) for alias in node.names}
  return found


def own_imports(module: str) -> set[str]:
  """The modules of experiments/ that a module imports."""
  pairs = [pair for pair in imported(parse(module)) if pair[0].split(".")[0] == "experiments"]
  return {f"{a}.{b}" if f"{a}.{b}" in MODULES else a for a, b in pairs}


GRAPH = {module: own_imports(module) for module in MODULES}


def room(module: str) -> str:
  """The folder right below experiments/, or "" for a command at the top."""
  parts = module.split(".")
  return parts[1] if ".".join(parts[:2]) in PACKAGES and len(parts) > 1 else ""


@pytest.mark.parametrize("module", MODULES)
def test_only_public_names_of_the_library(module):
  tree, public = parse(module), {*sm.__all__, "__version__", "mixed"}
  for source, name in imported(tree):
    if source.split(".")[0] == "shrinkmeta":
      assert source == "shrinkmeta" and (not name or name in public), (source, name)
  taken = {
    node.attr
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "sm"
  }
  assert taken <= public


def test_no_import_circle():
  done: set[str] = set()

  def visit(module: str, path: tuple[str, ...]) -> None:
    assert module not in path, f"circle: {' -> '.join([*path, module])}"
    if module not in done:
      for other in sorted(GRAPH[module]):
        assert other in GRAPH, f"{module} imports {other}, which does not exist"
        visit(other, (*path, module))
      done.add(module)

  for module in GRAPH:
    visit(module, ())
  assert done == set(MODULES)


def test_rooms_import_in_one_direction():
  left: dict[str, set[str]] = {}
  for module, others in GRAPH.items():
    left.setdefault(room(module), set()).update(room(other) for other in others)
  left = {name: others - {name} for name, others in left.items()}
  assert not any("" in others for others in left.values()), "a room imports a command"
  while left:
    free = {name for name, others in left.items() if not others & set(left)}
    assert free, f"these rooms import each other: {left}"
    left = {name: others for name, others in left.items() if name not in free}


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in APART])
def test_data_sets_networks_and_settings_know_nothing_of_each_other(module):
  assert {room(other) for other in GRAPH[module]} <= {room(module)}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_folder_says_what_it_is_and_has_few_files(package):
  assert ast.get_docstring(parse(package))
  files = [f for f in MODULES[package].parent.glob("*.py") if f.name != "__init__.py"]
  assert len(files) <= 8


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
  assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 350
  for node in ast.walk(parse(module)):
    if isinstance(node, ast.FunctionDef):
      assert (node.end_lineno or 0) - node.lineno < 90, node.name
