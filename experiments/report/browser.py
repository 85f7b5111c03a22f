"""Opens a page where somebody can see it."""

import os
import pathlib
import sys
import webbrowser

from absl import logging


def show(page: pathlib.Path) -> None:
  """Open a page in the browser, or log why not and where the page is."""
  seen = sys.platform in ("darwin", "win32") or any(
    os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
  )
  if not seen:
    logging.warning("There is no display to open a page on. Copy %s to a machine with one.", page)
  elif not webbrowser.open(page.absolute().as_uri()):
    logging.warning("No browser could be started. The page is %s", page)
