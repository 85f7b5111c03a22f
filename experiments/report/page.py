"""The HTML pages: a report of evaluated runs, and the page of one command that does everything."""

import pathlib
import re
from collections.abc import Mapping, Sequence

from absl import logging

from experiments.report import html, over_data, section
from experiments.report.evaluated import Evaluated, diverged_among, groups_of, heading
from experiments.report.tables import cost
from experiments.runs import files, store

_OWN_FILES = r"tables_\d+\.md|(adaptation|sigma_per_module|sigma_heat_map|data)_\d+\.png"


def write(
  paths: Sequence[files.Path], out: pathlib.Path, evaluation: str
) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """Write index.html, tables and pictures to `out`.

  Args:
    paths: folders that hold runs, at any depth.
    out: the folder of the report. Sections of an earlier report are removed if this one lacks them.
    evaluation: the name of the file of each run, without its suffix.

  Returns:
    (the path of the page, the damaged runs that it leaves out).
  """
  folders, unreadable = _readable(store.find(paths))
  groups, damaged = groups_of(folders, evaluation)
  diverged = [diverged_among(folders, members) for members in groups]
  out.mkdir(parents=True, exist_ok=True)
  earlier = [file for file in out.iterdir() if re.fullmatch(_OWN_FILES, file.name)]
  written = {file: file.stat().st_mtime_ns for file in earlier}
  sections = [
    section.write(out, i, members, [*own.values()])
    for i, (members, own) in enumerate(zip(groups, diverged, strict=True), 1)
  ]
  sections.append(over_data.write(out, groups))
  with files.atomic(out / "index.html") as temporary:
    temporary.write_text(html.page("report", "\n".join(sections)), encoding="utf-8")
  for file, time in written.items():
    if file.stat().st_mtime_ns == time:  # of an earlier report that had more sections
      file.unlink()
  for folder in set(filter(lambda f: store.diverged(f).exists(), folders)).difference(*diverged):
    logging.warning("%s diverged in training, and no other run is like it: left out.", folder)
  logging.info("The report is %s", out / "index.html")
  return out / "index.html", unreadable + damaged


def _readable(
  folders: Sequence[pathlib.Path],
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """Return (the runs whose run.json can be read, the others); log errors for the others."""
  found, errors = [], {}
  for folder in folders:
    try:
      store.read(folder)
    except ValueError as error:
      errors[folder] = str(error)
      continue
    found.append(folder)
  if not found:
    raise ValueError(next(iter(errors.values())))
  for error in errors.values():
    logging.error("A run is left out: %s", error)
  return found, list(errors)


def write_one(
  out: pathlib.Path,
  command: str,
  members: Sequence[Evaluated],
  diverged: Sequence[str],
  tables: Sequence[str],
  pictures: Mapping[str, str],
) -> None:
  """Write index.html with the command, its protocol, settings, tables and pictures.

  Args:
    out: the folder of the results.
    command: the command line, as a user types it.
    members: the runs, all of one protocol.
    diverged: the runs that diverged in training, in words. No mean includes them.
    tables: the tables, in Markdown.
    pictures: {name of a file in `out`: what it shows}.
  """
  settings, curves = members[0].settings, [one.curve for one in members]
  arms = {one.curve.algorithm: one.arm for one in members}
  used = [cost.cost_table(curves, settings["meta_batch"], arms), cost.settings_table(arms)]
  body = [
    f"<pre>{html.text(command)}</pre>",
    section.facts_list(section.facts(members, diverged)),
    *(html.picture(out / name, about) for name, about in pictures.items()),
    *map(html.tables, [*tables, *used]),
  ]
  with files.atomic(out / "index.html") as temporary:
    temporary.write_text(html.page(heading(settings), "\n".join(body)), encoding="utf-8")
