"""Keep what belongs together on one line in the cells of tables: 8.4 ± 3.0, K = 3."""

from docutils import nodes
from sphinx.application import Sphinx

SPACE = "\N{NO-BREAK SPACE}"


def join_numbers(app: Sphinx, doctree: nodes.document) -> None:
  """Replace the spaces around ± and = in short cells by spaces that do not break."""
  for cell in doctree.findall(nodes.entry):
    if len(cell.astext()) > 40:
      continue
    for text in list(cell.findall(nodes.Text)):
      if not isinstance(text.parent, nodes.literal):
        joined = text.replace(" ± ", f"{SPACE}±{SPACE}").replace(" = ", f"{SPACE}={SPACE}")
        text.parent.replace(text, nodes.Text(joined))


def setup(app: Sphinx) -> dict[str, bool]:
  """Connect to Sphinx."""
  app.connect("doctree-read", join_numbers)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
