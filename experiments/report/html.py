"""Tables and pictures as HTML."""

import base64
import html
import pathlib

_STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; background: #fff }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
pre { background: #f6f6f6; padding: .5rem .75rem; white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } img { max-width: 100% } dt { font-weight: bold }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .1rem 1rem }
dd { margin: 0 }
"""


def tables(markdown: str) -> str:
  """Return the paragraphs and Markdown tables of report/tables in HTML."""
  parts = []
  for block in markdown.strip().split("\n\n"):
    lines = block.splitlines()
    if not lines[0].startswith("|"):
      parts.append(f"<p>{html.escape(block)}</p>")
      continue
    cells = [[html.escape(c.strip()) for c in line.strip("|").split("|")] for line in lines]
    rows = [
      "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in row) + "</tr>"
      for row, tag in zip([cells[0], *cells[2:]], ["th"] + ["td"] * len(cells), strict=False)
    ]
    parts.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
  return "\n".join(parts)


def text(value: object) -> str:
  """Return a value as escaped text."""
  return html.escape(str(value))


def picture(file: pathlib.Path, title: str) -> str:
  """Return a PNG as an image embedded in the page."""
  data = base64.b64encode(file.read_bytes()).decode()
  return f'<img alt="{text(title)}" src="data:image/png;base64,{data}">'


def page(title: str, body: str) -> str:
  """Return a whole page that needs no other file."""
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>shrinkmeta: {text(title)}</title>"
    f"<style>{_STYLE}</style><h1>{text(title[:1].upper() + title[1:])}</h1>\n{body}\n</html>\n"
  )
