"""The order of the library's rooms, and limits on the size of files and functions.

Every violation is listed with its file and line.
"""

import ast
import collections
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).absolute().parents[1]
PACKAGE = "shrinkmeta"
# From the lowest room to the highest: a room is a folder or a module. A module imports from its own
# room and from lower ones.
ROOMS = (
  "checks",
  "model",
  "data",
  "devices",
  "quasi_newton",
  "config",
  "arguments",
  "base",
  "curvature",
  "mode",
  "gradients",
  "uncertainty",
  "formulas",
  "mixed",
  "learner",
  "algorithms",
  "diagnostics",
  "training",
  "choice",
  "adapters",
  "serving",
  "plots",
  "public",
  "__init__",
)
FOREIGN = ("experiments", "tests")
MOST_FILES, MOST_FILE_LINES, MOST_FUNCTION_LINES = 7, 350, 90


def paths(root):
  return sorted((root / PACKAGE).rglob("*.py"))


def module_name(path, root):
  """The dotted name of a file; a folder's __init__.py keeps its own name."""
  return ".".join(path.relative_to(root).with_suffix("").parts)


def room_of(module):
  """The part of a dotted name after the package's."""
  parts = module.split(".")
  return parts[1] if len(parts) > 1 else "__init__"


def imports(tree, module, modules):
  """(line, imported module) of all imports, also of those inside functions."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = module.split(".")[: -node.level]
        base = ".".join([*parents, *([node.module] if node.module else [])])
      # `from package import module` imports a module; any other name belongs to `base`.
      whole = [f"{base}.{alias.name}" for alias in node.names]
      is_module = lambda name: name in modules or f"{name}.__init__" in modules
      for imported in dict.fromkeys(name if is_module(name) else base for name in whole):
        yield node.lineno, imported


def parsed(root):
  """{module: (path, tree)} of the package under `root`."""
  return {
    module_name(path, root): (path, ast.parse(path.read_text(encoding="utf-8")))
    for path in paths(root)
  }


def own_imports(root):
  """(path, line, module, imported) of all imports of the package from itself."""
  trees = parsed(root)
  for module, (path, tree) in trees.items():
    for line, imported in imports(tree, module, trees):
      if imported.split(".")[0] == PACKAGE:
        if f"{imported}.__init__" in trees:
          imported = f"{imported}.__init__"
        yield path, line, module, imported


def where(path, line, root):
  return f"{path.relative_to(root)}:{line}"


def wrong_rooms(root):
  found = []
  for path in paths(root):
    if (room := room_of(module_name(path, root))) not in ROOMS:
      found.append(f"{where(path, 1, root)}: no room is called {room!r}")
  for path, line, module, imported in own_imports(root):
    room, other = room_of(module), room_of(imported)
    if {room, other} <= set(ROOMS) and ROOMS.index(other) > ROOMS.index(room):
      found.append(f"{where(path, line, root)}: {room} imports {imported}, from a room above it")
  return found


def circles(root):
  """The imports that lie on a circle of modules."""
  edges = collections.defaultdict(set)
  seen = list(own_imports(root))
  for _, _, module, imported in seen:
    edges[module].add(imported)

  def reachable(start):
    found, stack = set(), [start]
    while stack:
      for following in edges[stack.pop()] - found:
        found.add(following)
        stack.append(following)
    return found

  reach = {module: reachable(module) for module in list(edges)}
  return [
    f"{where(path, line, root)}: {module} imports {imported}, which leads back to it"
    for path, line, module, imported in seen
    if module == imported or module in reach.get(imported, ())
  ]


def foreign_imports(root):
  trees = parsed(root)
  return [
    f"{where(path, line, root)}: imports {imported}"
    for module, (path, tree) in trees.items()
    for line, imported in imports(tree, module, trees)
    if imported.split(".")[0] in FOREIGN
  ]


def full_rooms(root):
  counts = collections.Counter(p.parent for p in paths(root) if p.name != "__init__.py")
  del counts[root / PACKAGE]  # the package's own folder holds the rooms that are single files
  return [
    f"{folder.relative_to(root)}: {count} files, more than {MOST_FILES}"
    for folder, count in counts.items()
    if count > MOST_FILES
  ]


def long_files(root):
  lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths(root)}
  return [
    f"{where(path, count, root)}: {count} lines, more than {MOST_FILE_LINES}"
    for path, count in lines.items()
    if count > MOST_FILE_LINES
  ]


def long_functions(root):
  """Functions by all their lines: signature, docstring and nested functions."""
  return [
    f"{where(path, node.lineno, root)}: {node.name} has {count} lines, more than "
    f"{MOST_FUNCTION_LINES}"
    for path, tree in parsed(root).values()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    and (count := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES
  ]


RULES = (wrong_rooms, circles, foreign_imports, full_rooms, long_files, long_functions)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_library_keeps_the_rule(rule):
  found = rule(ROOT)
  assert not found, "\n" + "\n".join(found)


@pytest.fixture
def library(tmp_path):
  """Writes files of a small package, {path: text}, and returns its root."""

  def write(**files):
    for name, text in files.items():
      path = tmp_path / PACKAGE / f"{name.replace('_dot_', '/')}.py"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    return tmp_path

  return write


def test_an_import_from_a_room_above_is_found(library):
  root = library(
    model_dot_tasks="from shrinkmeta.gradients.total import x\n",
    gradients_dot_total="from shrinkmeta.model import tasks\nfrom ..mode import warm\n",
    mode_dot_warm="def f():\n  import shrinkmeta.gradients.total\n",
    other="",
  )
  assert wrong_rooms(root) == [
    "shrinkmeta/other.py:1: no room is called 'other'",
    "shrinkmeta/mode/warm.py:2: mode imports shrinkmeta.gradients.total, from a room above it",
    "shrinkmeta/model/tasks.py:1: model imports shrinkmeta.gradients.total, from a room above it",
  ]


def test_a_circle_is_found(library):
  root = library(
    mode_dot_a="from shrinkmeta.mode import b\n",
    mode_dot_b="\nimport shrinkmeta.mode.c\n",
    mode_dot_c="from . import a\n",
    mode_dot_d="from shrinkmeta.mode.a import x\n",
  )
  assert [line.split(":")[:2] for line in circles(root)] == [
    ["shrinkmeta/mode/a.py", "1"],
    ["shrinkmeta/mode/b.py", "2"],
    ["shrinkmeta/mode/c.py", "1"],
  ]


def test_sizes_and_foreign_imports_are_found(library):
  root = library(
    **{f"mode_dot_m{i}": "" for i in range(8)},
    model_dot_long="x = 1\n" * 351,
    model_dot_function="def f():\n" + "  x = 1\n" * 90,
    devices_dot_wrong="import experiments.runs\nfrom tests import fit_worker\n",
  )
  assert full_rooms(root) == ["shrinkmeta/mode: 8 files, more than 7"]
  assert long_files(root) == ["shrinkmeta/model/long.py:351: 351 lines, more than 350"]
  assert long_functions(root) == ["shrinkmeta/model/function.py:1: f has 91 lines, more than 90"]
  assert foreign_imports(root) == [
    "shrinkmeta/devices/wrong.py:1: imports experiments.runs",
    "shrinkmeta/devices/wrong.py:2: imports tests",
  ]


def test_a_mixed_model_needs_no_jax():
  """JAX takes 200 MB and a second of processor time, more than the fit of a small model."""
  program = """
    import sys
    from experiments.mixed import __main__ as _
    import shrinkmeta as sm
    table = {"y": [1.0, 2.0, 4.0, 3.0, 5.0, 7.0], "g": list("aabbcc")}
    found = sm.mixed.fit("y ~ 1 + (1 | g)", table).estimates
    mean_squares = (20 + 1 / 3) / 3, 1.0  # between and within groups of two
    assert abs(found.sd["(Intercept)"] ** 2 - (mean_squares[0] - mean_squares[1]) / 2) < 1e-5
    assert not {"jax", "jaxlib", "flax", "optax"} & set(sys.modules), "JAX is imported"
  """
  command = [sys.executable, "-c", textwrap.dedent(program)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr


def test_the_library_does_not_import_nnx():
  """Importing flax.nnx takes a second, and loads IPython. The library uses is_nnx_variable."""
  for path in paths(ROOT):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, imported in imports(tree, "", {"flax.nnx"}):
      assert not imported.startswith("flax.nnx"), where(path, line, ROOT)
