"""Versions of the Universal Declaration of Human Rights, with one language as a task.

A version is one text in one language and script. All versions have the same 30 articles, so that
languages are compared on the same content. The file declarations.jsonl.gz has one JSON object in
each line. The project does not contain this file. `synthetic` makes texts of artificial languages
as a substitute.
"""

import gzip
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from absl import logging

from experiments.datasets.files import cache
from experiments.datasets.files.cache import DamagedError

FILE = "declarations.jsonl.gz"
ARTICLES = 30
UNKNOWN = "und"  # ISO 639-3 for a language that is not determined
_KEYS = {"code": str, "iso639_3": str, "name": str, "articles": list}
_LONGEST = 2**20  # bytes of a line; the longest of the published file has about 50,000
_VERSIONS = 519  # complete ones in the published file
_FEWEST = 4_000  # bytes of all articles; shorter versions are excerpts


class Version(NamedTuple):
  """One text of the declaration."""

  code: str  # of the version
  language: str  # ISO 639-3
  name: str  # of the language, with script or place where several versions exist
  articles: tuple[str, ...]  # [ARTICLES], the paragraphs of an article joined by line breaks


def load(data_dir: cache.Folder | None = None) -> tuple[Version, ...]:
  """Return the complete versions: all articles, and more than 4,000 bytes.

  Memory holds the versions and one line of the file.

  Args:
    data_dir: the folder of declarations.jsonl.gz; default $SHRINKMETA_DATA/udhr.

  Raises:
    FileNotFoundError: the file is missing.
    DamagedError: the file is not a gzip file or is damaged, or a line lacks a key or has an empty
      article. The message names the file and the line.
  """
  path = cache.data_folder("udhr", data_dir) / FILE
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist. Give another data_dir.")
  found: dict[str, Version] = {}
  for number, line in _lines(path):
    version = _version(f"{path}, line {number}", line)
    if version.code in found:
      raise DamagedError(
        f"{path}, line {number}: the code {version.code!r} occurs twice. Download it anew."
      )
    found[version.code] = version
  whole = lambda v: len(v.articles) == ARTICLES and num_bytes(v.articles) > _FEWEST
  versions = tuple(version for version in found.values() if whole(version))
  if not versions:
    raise DamagedError(
      f"{path} has {len(found)} versions, none of them with {ARTICLES} articles. Download it anew."
    )
  if len(versions) != _VERSIONS:
    logging.warning(
      "%s has %d whole versions, and the file that the results were made from %d. Is it whole?",
      path,
      len(versions),
      _VERSIONS,
    )
  return versions


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yield (number from 1, line) without the empty lines; at most _LONGEST bytes are read ahead."""
  number = 0
  with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as file:
    while True:
      number += 1
      try:
        line = file.readline(_LONGEST + 1)
      except (OSError, EOFError, zlib.error) as error:
        raise DamagedError(
          f"{path}, line {number}: damaged or not whole, {error!r}. Download it anew."
        ) from error
      if not line:
        return
      if len(line) > _LONGEST:
        raise DamagedError(
          f"{path}, line {number} has more than {_LONGEST} bytes. Download it anew."
        )
      if line.strip():
        yield number, line


def _version(where: str, line: bytes) -> Version:
  """Return the version in a line, or raise DamagedError that begins with `where`."""
  wrong = lambda what: DamagedError(f"{where}: {what}. Download it anew.")
  try:
    entry: Any = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise wrong(f"no JSON in UTF-8, {error!r:.200}") from error
  if not isinstance(entry, dict):
    raise wrong(f"wanted a JSON object with {', '.join(_KEYS)}; got {type(entry).__name__}")
  for key, kind in _KEYS.items():
    if key not in entry:
      raise wrong(f"the key {key!r} is missing; there are {', '.join(map(str, entry))}")
    if not isinstance(entry[key], kind) or not entry[key]:
      raise wrong(f"{key} must be a {kind.__name__} that is not empty; got {entry[key]!r:.80}")
  articles = []
  for i, paragraphs in enumerate(entry["articles"], 1):
    if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
      raise wrong(f"article {i} must be a list of texts; got {paragraphs!r:.80}")
    articles.append("\n".join(paragraphs))
    if not articles[-1].strip():
      raise wrong(f"article {i} is empty")
    if "\0" in articles[-1]:
      raise wrong(f"article {i} has a zero byte, which stands for padding")
  return Version(entry["code"], entry["iso639_3"], entry["name"], tuple(articles))


def num_bytes(articles: Sequence[str]) -> int:
  """Return the number of bytes of the articles in UTF-8."""
  return sum(len(article.encode()) for article in articles)


def split(
  versions: Sequence[Version], counts: Sequence[int], seed: int
) -> tuple[tuple[Version, ...], ...]:
  """Split the versions by language: all versions of a language are on the same side.

  Versions of undetermined languages ("und") go to the last part, because they may be dialects of
  each other. Some texts stand under the codes of two languages. A part leaves out every version
  that shares an article of 100 characters or more with an earlier part.

  Args:
    versions: the versions to split.
    counts: the numbers of languages of the first parts. The last part takes the other languages.
    seed: fixes the random order of the languages.

  Returns:
    len(counts) + 1 parts, each in random order of languages.

  Raises:
    ValueError: there are not enough languages for `counts` and one more for the last part.
  """
  languages = sorted({v.language for v in versions} - {UNKNOWN})
  if sum(counts) >= len(languages) or min(counts) < 1:
    raise ValueError(
      f"The split wants {' + '.join(map(str, counts))} languages, at least one each, and at least "
      f"one more to train on; the data have {len(languages)}. Ask for fewer."
    )
  order = [languages[i] for i in np.random.default_rng((seed, 1)).permutation(len(languages))]
  rest, earlier, parts = [*order, UNKNOWN], set(), []
  for count in (*counts, len(rest)):
    part: list[tuple[Version, ...]] = []
    while rest and len(part) < count:
      language = rest.pop(0)
      own = [v for v in versions if v.language == language and earlier.isdisjoint(_texts(v))]
      part += [tuple(own)] if own else []
    parts.append(tuple(v for own in part for v in own))
    earlier.update(*map(_texts, parts[-1]))
  if not all(parts):
    raise ValueError("Too many languages share their text with others. Ask for fewer.")
  return tuple(parts)


def _texts(version: Version) -> set[str]:
  """Return the articles that are too long to be equal by chance."""
  return {article for article in version.articles if len(article) >= 100}


def one_a_language(versions: Sequence[Version]) -> tuple[Version, ...]:
  """Return the first version of every language, in the order of the codes."""
  first: dict[str, Version] = {}
  for version in sorted(versions, key=lambda v: v.code):
    first.setdefault(version.language, version)
  return tuple(first[language] for language in dict.fromkeys(v.language for v in versions))


def synthetic(languages: int = 24, seed: int = 0, words: int = 12) -> tuple[Version, ...]:
  """Return texts of artificial languages, for tests and for users without the file.

  A language is a random vocabulary over its own letters. Article i has the same sequence of words
  in all languages, so that content is shared as in the real data. Every fourth language has two
  versions, one in lower and one in upper case.

  Args:
    languages: the number of languages.
    seed: fixes the texts.
    words: the number of words of an article.
  """
  rng = np.random.default_rng((seed, 2))
  meanings = rng.integers(0, 40, (ARTICLES, words))
  found = []
  for n in range(languages):
    letters = rng.choice(list("abcdefghijklmnoprstuvzäéóñæ"), 9, replace=False)
    vocabulary = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(40)]
    articles = tuple(" ".join(vocabulary[m] for m in article) + "." for article in meanings)
    language = f"x{n:02d}"
    found.append(Version(language, language, f"Artificial {n}", articles))
    if n % 4 == 0:
      upper = tuple(article.upper() for article in articles)
      found.append(Version(f"{language}_upper", language, f"Artificial {n}, upper case", upper))
  return tuple(found)


def digest(versions: Sequence[Version]) -> str:
  """Return the SHA-256 of codes, languages and texts, in hexadecimal."""
  total = hashlib.sha256()
  for version in versions:
    for text in (version.code, version.language, *version.articles):
      total.update(text.encode() + b"\0")
  return total.hexdigest()


def write(file: IO[bytes], versions: Sequence[Version]) -> None:
  """Write versions in the layout that `load` reads."""
  with (
    gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
    io.TextIOWrapper(packed, encoding="utf-8") as text,
  ):
    for v in versions:
      entry: dict[str, Any] = {"code": v.code, "iso639_3": v.language, "name": v.name}
      entry["articles"] = [article.split("\n") for article in v.articles]
      text.write(json.dumps(entry, ensure_ascii=False) + "\n")
