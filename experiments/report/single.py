"""The page of a command that trains, evaluates and reports at once."""

import pathlib
from collections.abc import Mapping, Sequence

from experiments.report import html, section
from experiments.report.evaluated import Evaluated, heading
from experiments.report.tables import cost
from experiments.runs import files


def write(
  out: pathlib.Path,
  command: str,
  members: Sequence[Evaluated],
  diverged: Sequence[str],
  tables: Sequence[str],
  pictures: Mapping[str, str],
) -> pathlib.Path:
  """Write index.html, which holds all that the command found.

  Args:
    out: folder of the results.
    command: what was typed, to run it again.
    members: the runs, of one protocol.
    diverged: runs that diverged in training, in words. No mean has them.
    tables: in Markdown.
    pictures: file in `out` -> what it shows.

  Returns:
    The path of the page.
  """
  settings, curves = members[0].settings, [one.curve for one in members]
  arms = {one.curve.algorithm: one.arm for one in members}
  used = [
    cost.cost_table(curves, settings["meta_batch"], arms),
    cost.settings_table(arms),
  ]
  body = [
    f"<pre>{html.text(command)}</pre>",
    section.facts_list(members, diverged),
    *(html.picture(out / name, about) for name, about in pictures.items()),
    *map(html.tables, [*tables, *used]),
  ]
  path = out / "index.html"
  with files.atomic(path) as temporary:
    temporary.write_text(html.page(heading(settings), "\n".join(body)), encoding="utf-8")
  return path
