"""Check the links of the built site: python docs/check_site.py docs/_build/html

Every link to a page, an anchor, a picture or a file of the site must lead somewhere. Links to other
sites are listed and not visited. The exit code is 1 if a link is dead.
"""

import html.parser
import pathlib
import sys
import urllib.parse


class Page(html.parser.HTMLParser):
  """The links and the anchors of a page."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.links: list[str] = []
    self.anchors: set[str] = set()
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    """Collect href and src, and id and the name of <a>."""
    for name, value in attrs:
      if value is None:
        continue
      if name == "id" or (tag == "a" and name == "name"):
        self.anchors.add(value)
      elif name in ("href", "src") and tag != "base":
        self.links.append(value)


def check(folder: pathlib.Path) -> tuple[list[str], set[str]]:
  """Read the pages of a folder.

  Args:
    folder: where the site was built.

  Returns:
    (the dead links, each with its page and the reason; the links to other sites).
  """
  root = folder.resolve()
  pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.html"))}
  dead, outside = [], set()
  for path, page in pages.items():
    for link in sorted(set(page.links)):
      parts = urllib.parse.urlsplit(link)
      if parts.scheme or parts.netloc:
        if parts.scheme != "data":
          outside.add(link)
        continue
      target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
      anchor = urllib.parse.unquote(parts.fragment)
      here = path.relative_to(root)
      if not target.is_relative_to(root) or not target.is_file():
        dead.append(f"{here}: {link}: there is no such file")
      elif anchor and target in pages and anchor not in pages[target].anchors:
        dead.append(f"{here}: {link}: the page has no such anchor")
  return dead, outside


def main() -> int:
  """Check the folder that the command line names."""
  if len(sys.argv) != 2 or not (folder := pathlib.Path(sys.argv[1])).is_dir():
    print("Name the folder of the built site: python docs/check_site.py docs/_build/html")
    return 2
  dead, outside = check(folder)
  count = sum(1 for _ in folder.rglob("*.html"))
  if not count:
    print(f"{folder} has no page: build the site first")
    return 2
  print("\n".join(["Links to other sites, not visited:", *(f"  {x}" for x in sorted(outside))]))
  print("\n".join(["Dead links:", *(f"  {x}" for x in dead)]) if dead else "No dead link.")
  print(f"{count} pages")
  return 1 if dead else 0


if __name__ == "__main__":
  sys.exit(main())
