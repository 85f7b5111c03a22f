"""Links from the pages into the code.

A page links to a file, as GitHub shows it: [`cg`](../shrinkmeta/curvature/solvers.py). In the site,
a link to a public name leads to its entry in the reference, and every other link to a page with the
file's text, at the line that defines the name. Such a page begins with links to the entries of the
public names in the file. `sm.fit` and `mixed.fit` in the text of a page become links, too.
"""

import importlib
import inspect
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import guess_lexer_for_filename
from sphinx import addnodes
from sphinx.application import Sphinx

import shrinkmeta as sm

ROOT = pathlib.Path(__file__).absolute().parents[2]
SHOWN = {".py", ".sh", ".yml", ".yaml", ".cfg", ".toml"}
PUBLIC = set(sm.__all__)
LEARNER = sm.maml(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
_ROOMS = ("lora", "export", "priors", "plots", "mixed")
_NAME = re.compile(rf"(?:sm\.|(?=mixed\.))((?:(?:{'|'.join(_ROOMS)})\.)?\w+)(\(|$)")


def file_of(name: str) -> tuple[str, int] | None:
  """The file and line that define a public name, such as shrinkmeta.lora.init."""
  value: Any = sm
  for part in name.split(".")[1:]:
    value = getattr(value, part, None)
  value = inspect.unwrap(value.fget if isinstance(value, property) else value)
  if not (inspect.isfunction(value) or inspect.isclass(value)):
    return None
  if not value.__module__.startswith("shrinkmeta"):
    return None
  path = pathlib.Path(inspect.getfile(importlib.import_module(value.__module__)))
  return str(path.relative_to(ROOT)), inspect.getsourcelines(value)[1]


def line_of(path: pathlib.Path, name: str) -> int | None:
  """The line of a file that defines a name."""
  definition = re.compile(rf"^\s*(?:def|class) {name}\b|^{name}\b.*=")
  lines = path.read_text(encoding="utf-8").splitlines()
  return next((n + 1 for n, line in enumerate(lines) if definition.match(line)), None)


def entry_of(file: str, name: str) -> str | None:
  """The entry of the reference for a name that a file defines, or None if the name is private."""
  for public in (name, *(f"{room}.{name}" for room in _ROOMS if name in names_of_room(room))):
    if target_exists(public) and (file_of(f"shrinkmeta.{public}") or [""])[0] == file:
      return f"shrinkmeta.{public}"
  function = getattr(LEARNER, name, None)  # learner.init, learner.update, ...
  if inspect.ismethod(function) and _file(function.__func__) == file:
    return f"shrinkmeta.MetaLearner.{name}"
  return None


def names_of_room(room: str) -> list[str]:
  """The names that a module such as sm.lora offers, without those that it imports for itself."""
  module = getattr(sm, room)
  return list(getattr(module, "__all__", vars(module)))


def public_names(file: str) -> list[str]:
  """The public names that a file defines, as their entries in the reference: shrinkmeta.fit."""
  own = [f"shrinkmeta.{name}" for name in sm.__all__]
  own += [f"shrinkmeta.{room}.{name}" for room in _ROOMS for name in names_of_room(room)]
  own += [f"shrinkmeta.MetaLearner.{name}" for name in LEARNER._fields]
  return [x for x in own if entry_of(file, x.rpartition(".")[2]) == x]


def _file(function: Any) -> str:
  """The file of a function, relative to the root."""
  return str(pathlib.Path(inspect.getfile(function)).relative_to(ROOT))


def source_link(app: Sphinx, docname: str, file: str, line: int | None) -> str:
  """The address of a file's page, as seen from the page `docname`; the page will be written."""
  shown: set[str] = app.env.__dict__.setdefault("shown_sources", set())
  shown.add(file)
  here = app.builder.get_target_uri(docname)
  there = app.builder.get_target_uri(f"source/{file}")
  return posixpath.relpath(there, posixpath.dirname(here)) + (f"#line-{line}" if line else "")


def link_files(app: Sphinx, doctree: nodes.document) -> None:
  """Turn downloads of code into links to its page or to the reference."""
  docname = app.env.docname
  for node in list(doctree.findall(addnodes.download_reference)):
    path = (ROOT / posixpath.dirname(docname) / node["reftarget"]).resolve()
    if path.suffix not in SHOWN or not path.is_relative_to(ROOT):
      continue
    file, name = str(path.relative_to(ROOT)), node.astext().split(".")[-1]
    code = next(iter(node.findall(nodes.literal)), None)  # MyST wraps it in an inline node
    is_name = code is not None and code.astext() == node.astext() and name.isidentifier()
    if is_name and (entry := entry_of(file, name)):
      node.replace_self(reference_to(entry, docname, code.deepcopy()))
      continue
    line = line_of(path, name) if is_name and path.suffix == ".py" else None
    link = nodes.reference("", "", internal=True, refuri=source_link(app, docname, file, line))
    link += [child.deepcopy() for child in node.children]
    node.replace_self(link)


def reference_to(target: str, docname: str, content: nodes.Node) -> nodes.Node:
  """A link to an entry of the reference."""
  domain = {"refdomain": "py", "reftype": "obj", "reftarget": target, "refdoc": docname}
  return addnodes.pending_xref("", content, refexplicit=True, refwarn=True, **domain)


def link_names(app: Sphinx, doctree: nodes.document) -> None:
  """Turn `sm.name`, `sm.name(...)` and `mixed.name(...)` in a page into links to the reference."""
  for node in list(doctree.findall(nodes.literal)):
    match = _NAME.match(node.astext())
    inside_link = isinstance(node.parent, nodes.reference | addnodes.pending_xref | nodes.title)
    if match and not inside_link and target_exists(match[1]):
      link = reference_to(f"shrinkmeta.{match[1]}", app.env.docname, node.deepcopy())
      node.replace_self(link)


def target_exists(name: str) -> bool:
  """Whether the reference has an entry for sm.NAME, such as fit, lora.init or mixed.Fit."""
  if "." not in name:
    return name in PUBLIC
  module, _, last = name.partition(".")
  value = getattr(getattr(sm, module), last, None)
  return inspect.isfunction(value) or inspect.isclass(value)


def add_source_links(app: Sphinx, doctree: nodes.document) -> None:
  """Add [source] to the signatures of the reference, and `sm.` to names without a class."""
  for signature in doctree.findall(addnodes.desc_signature):
    if signature.get("module") and not signature.get("class"):
      for prefix in list(signature.findall(addnodes.desc_addname)):
        prefix.parent.remove(prefix)
      room = signature["module"].partition(".")[2]
      prefix = "sm." if not room else f"sm.{room}." if room in PUBLIC else f"{room}."
      place = next(iter(signature.findall(addnodes.desc_name)))
      signature.insert(signature.index(place), addnodes.desc_addname(prefix, prefix))
    name = ".".join(x for x in (signature.get("module"), signature.get("fullname")) if x)
    if found := file_of(name) if name.startswith("shrinkmeta") else None:
      link = nodes.reference(
        "", "", internal=True, refuri=source_link(app, app.env.docname, *found)
      )
      link += nodes.inline("", "[source]", classes=["viewcode-link"])
      signature += link


def resolve_name(
  app: Sphinx, env: Any, node: addnodes.pending_xref, content: nodes.Node
) -> nodes.Node | None:
  """Find `sm.name` of a docstring under its full name."""
  target = node.get("reftarget", "")
  if node.get("refdomain") != "py" or not target.startswith("sm."):
    return None
  full = "shrinkmeta." + target[3:].partition("(")[0]
  return env.domains["py"].resolve_xref(
    env, node["refdoc"], app.builder, "obj", full, node, content
  )


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
  """Yield the pages of the files that are linked."""
  format_ = HtmlFormatter(lineanchors="line", wrapcode=True)
  for file in sorted(app.env.__dict__.get("shown_sources", ())):
    text = (ROOT / file).read_text(encoding="utf-8")
    body = highlight(text, guess_lexer_for_filename(file, text), format_)
    body = f"<h1>{file}</h1>\n{links_to_entries(app, file)}{body}"
    yield f"source/{file}", {"title": file, "body": body}, "page.html"


def links_to_entries(app: Sphinx, file: str) -> str:
  """A line with the entries of the public names of a file, or "" if it has none."""
  links = []
  for name in public_names(file):
    if entry := app.env.get_domain("py").objects.get(name):
      uri = app.builder.get_relative_uri(f"source/{file}", entry.docname)
      links.append(f'<a href="{uri}#{entry.node_id}"><code>{shown_name(name)}</code></a>')
  return f"<p>In the reference: {', '.join(links)}.</p>\n" if links else ""


def shown_name(name: str) -> str:
  """An entry as users write it: sm.fit, learner.init."""
  return name.replace("shrinkmeta.MetaLearner.", "learner.").replace("shrinkmeta.", "sm.")


def merge_sources(app: Sphinx, env: Any, docnames: list[str], other: Any) -> None:
  """Join what parallel readers have found."""
  shown = env.__dict__.setdefault("shown_sources", set())
  shown.update(other.__dict__.get("shown_sources", ()))


def setup(app: Sphinx) -> dict[str, bool]:
  """Connect to Sphinx. The links are made before Sphinx collects the downloads."""
  app.connect("doctree-read", link_files, priority=100)
  app.connect("doctree-read", link_names, priority=101)
  app.connect("doctree-read", add_source_links, priority=102)
  app.connect("missing-reference", resolve_name)
  app.connect("env-merge-info", merge_sources)
  app.connect("html-collect-pages", source_pages)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
