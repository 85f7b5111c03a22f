"""Paths from users: a leading ~ is the home folder, and a URL is an error before any work."""

import pathlib
import re

from absl import flags


def local(what: str, text: str) -> pathlib.Path:
  """Return a path of a mounted file system, with a leading ~ expanded.

  Raises:
    ValueError: `text` is a URL, or names the home of an unknown user. A URL would become a folder
      of that name. The message begins with `what`.
  """
  # pathlib drops the second "/" of a URL. A single letter can be a drive of Windows.
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
    raise ValueError(
      f"{what} is a path of a mounted file system; got the URL {text!r}. Mount the bucket, for "
      "example with gcsfuse, and give the folder it is mounted at."
    )
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise ValueError(f"{what} is {text!r}: {error} Write the folder out.") from error


class PathParser(flags.ArgumentParser[str]):
  """A flag's parser that applies `local`."""

  syntactic_help = "a path"

  def parse(self, argument: str) -> str:
    """Return the path as text, and "" unchanged; raise ValueError like `local`."""
    return str(local("This flag", argument)) if argument else ""

  def flag_type(self) -> str:
    """Return the name of the type for --help."""
    return "path"


def define(name: str, meaning: str) -> flags.FlagHolder[str | None]:
  """Define a flag for a path, without a default."""
  return flags.DEFINE(PathParser(), name, None, meaning)
