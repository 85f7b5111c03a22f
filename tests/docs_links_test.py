"""Every relative link of the documents leads to a file or an anchor that exists.

The documents are the pages at the top and those in docs/, experiments/ and results/. A link to a
Python file whose text is a name in backticks, [`f`](../shrinkmeta/a.py), also says that the file
defines this name.
"""

import pathlib
import re
import string

import pytest

ROOT = pathlib.Path(__file__).absolute().parents[1]
PAGES = [
  *(ROOT / name for name in ("README.md", "BUILD.md", "CONTRIBUTING.md", "CHANGELOG.md")),
  *sorted((ROOT / "docs").glob("*.md")),
  *sorted((ROOT / "experiments").rglob("*.md")),
  *sorted((ROOT / "results").rglob("*.md")),
]
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^```.*?^```$", re.S | re.M)


def links_of(text: str) -> list[tuple[str, str]]:
  """(text, target) of the links that lead into the repository."""
  found = _LINK.findall(_CODE.sub("", text))
  return [(name, target) for name, target in found if not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
  """The anchors that GitHub gives the headings of a page, and those written as <a id="...">."""
  anchors: set[str] = set(re.findall(r'<a id="([^"]+)"></a>', text))
  for heading in re.findall(r"^#+ (.+?)\s*$", _CODE.sub("", text), re.M):
    kept = (c for c in heading.lower() if c in "-_ " or c not in string.punctuation)
    slug = "".join(kept).replace(" ", "-")
    again = 1
    while (anchor := slug if again == 1 else f"{slug}-{again - 1}") in anchors:
      again += 1
    anchors.add(anchor)
  return anchors


def problem_of(page: pathlib.Path, name: str, target: str) -> str | None:
  """What is wrong with a link, or None."""
  file, _, anchor = target.partition("#")
  path = (page.parent / file).resolve() if file else page
  if not path.is_relative_to(ROOT) or not path.exists():
    return f"{target}: there is no such file"
  if anchor and anchor not in anchors_of(path.read_text(encoding="utf-8")):
    return f"{target}: {path.name} has no heading with this anchor"
  defined = re.fullmatch(r"`(?:\w+\.)*(\w+)`", name)
  if path.suffix == ".py" and defined:
    definition = rf"^\s*(?:def|class) {defined[1]}\b|^{defined[1]}\b.*="
    if not re.search(definition, path.read_text(encoding="utf-8"), re.M):
      return f"{target}: the file does not define {defined[1]}"
  return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
  links = links_of(page.read_text(encoding="utf-8"))
  assert not list(filter(None, (problem_of(page, *link) for link in links)))


def test_comments_point_to_hazards_that_are_there():
  hazards = anchors_of((ROOT / "docs/hazards.md").read_text(encoding="utf-8"))
  pointed = set()
  for folder in ("shrinkmeta", "experiments"):
    for path in (ROOT / folder).rglob("*.py"):
      pointed |= set(re.findall(r"docs/hazards\.md#([\w-]+)", path.read_text(encoding="utf-8")))
  assert pointed, "no comment points to docs/hazards.md"
  assert not pointed - hazards


def test_every_page_of_the_docs_has_one_title_and_is_linked_from_the_readme():
  linked = {target for _, target in links_of((ROOT / "README.md").read_text(encoding="utf-8"))}
  for page in sorted((ROOT / "docs").glob("*.md")):
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    assert len(re.findall("^# ", text, re.M)) == 1, page.name
    assert f"docs/{page.name}" in linked, page.name


def test_the_map_has_every_file_of_the_library_and_no_other():
  on_map, room = set(), ""
  for line in (ROOT / "docs/map.md").read_text(encoding="utf-8").splitlines():
    if match := re.match(r"\|([^|]*)\| `(\w+\.py)` \|", line):
      if name := match[1].strip():
        room = name.strip("`") if name.endswith("/`") else ""
      on_map.add(room + match[2])
  library = ROOT / "shrinkmeta"
  files = {str(path.relative_to(library)) for path in library.rglob("[!_]*.py")}
  assert sorted(on_map) == sorted(files)


@pytest.mark.parametrize(
  "name,target,wrong",
  (
    ("a", "README.md", None),
    ("a", "NONE.md", "no such file"),
    ("a", "../outside.md", "no such file"),
    ("a", "README.md#install", None),
    ("a", "README.md#nowhere", "no heading"),
    ("`links_of`", "tests/docs_links_test.py", None),
    ("`nothing`", "tests/docs_links_test.py", "does not define"),
  ),
)
def test_a_wrong_link_is_found(name, target, wrong):
  found = problem_of(ROOT / "README.md", name, target)
  assert found is None if wrong is None else wrong in str(found)


def test_anchors_are_those_of_github():
  text = "# A `b`, c\n## x-y z\n## x-y z\n```\n# code\n```\n"
  assert anchors_of(text) == {"a-b-c", "x-y-z", "x-y-z-1"}
