"""Signatures in the reference, as the code has them."""

import ast
import inspect
import pathlib
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx


def signature_as_written(
  app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: Any
) -> tuple[str | None, Any] | None:
  """Show a signature with the names of types that the code uses, such as Labels and Batching.

  A default that is a constant of the file, such as PHI_OPTIMIZER, is shown as its value.
  """
  if not inspect.isfunction(thing):
    return None
  node = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
  assert isinstance(node, ast.FunctionDef)
  if what == "method" and node.args.args[0].arg in ("self", "cls"):
    del node.args.args[0]
  known = constants_of(pathlib.Path(inspect.getfile(thing)).read_text(encoding="utf-8"))
  value = lambda match: "=" + known.get(match[1], match[1])
  arguments = re.sub(r"=([A-Z][A-Z_]+)\b", value, ast.unparse(node.args))
  return f"({arguments})", ast.unparse(node.returns) if node.returns else None


def constants_of(source: str) -> dict[str, str]:
  """Return {name: value as written} of the constants of a file."""
  found = {}
  for node in ast.parse(source).body:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      found[node.targets[0].id] = ast.get_source_segment(source, node.value) or ""
  return found


def setup(app: Sphinx) -> dict[str, bool]:
  """Connect to Sphinx."""
  app.setup_extension("sphinx.ext.autodoc")
  app.connect("autodoc-process-signature", signature_as_written)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
