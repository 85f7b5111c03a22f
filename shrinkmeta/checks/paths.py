"""Read the paths that callers pass: expand a leading ~, and tell URLs from folders."""

import os
import pathlib
import re

from shrinkmeta.checks import validate

Path = str | os.PathLike[str]


def expanded(name: str, value: Path) -> pathlib.Path | str:
  """Turn a path into a pathlib.Path with a leading ~ expanded, and leave a URL as it is.

  Args:
    name: the name of the argument, for the error message.
    value: the path.

  Returns:
    The path; a relative path stays relative. A URL is returned as a str.

  Raises:
    TypeError: if `value` is not a path.
    ValueError: if `value` names the home of an unknown user.

  >>> expanded("folder", "gs://bucket/runs")
  'gs://bucket/runs'
  """
  validate.instance(name, value, (str, os.PathLike), "a path (str or os.PathLike)")
  text = os.fspath(value)
  validate.instance(name, text, str, "a path of text, not of bytes")
  if _is_url(text):
    return text
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError as error:
    raise ValueError(f"{name} is {text!r}: {error} Write the folder out.") from error


def local_path(name: str, value: Path) -> pathlib.Path:
  """Turn a path into a pathlib.Path with a leading ~ expanded, and refuse a URL.

  Args:
    name: the name of the argument, for the error message.
    value: the path.

  Returns:
    The path; a relative path stays relative.

  Raises:
    TypeError: if `value` is not a path.
    ValueError: if `value` is a URL, or names the home of an unknown user.

  >>> local_path("folder", "runs/first").name
  'first'
  """
  path = expanded(name, value)
  if isinstance(path, str):
    raise ValueError(
      f"{name} must be a path of a mounted file system; got the URL {path!r}. Mount the bucket "
      "(for example with gcsfuse) and pass the folder it is mounted at."
    )
  return path


def _is_url(text: str) -> bool:
  """Tell whether a path begins with the scheme of a URL, such as "gs:/" or "gs://".

  A scheme here has at least two letters, because a single letter can be a drive of Windows.
  """
  return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None  # str(Path("gs://x")) is "gs:/x"
