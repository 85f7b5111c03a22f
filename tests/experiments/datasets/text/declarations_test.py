"""The reader of the declarations: damaged files, the split by language, and windows of bytes."""

import gzip
import io
import json
import math
import os
import pathlib
import tracemalloc

import numpy as np
import pytest

from experiments.datasets.files.cache import DamagedError
from experiments.datasets.text import declarations, windows


def entry(**changes):
  whole = {"code": "a", "iso639_3": "aaa", "name": "A", "articles": [["x" * 200]] * 30}
  return whole | changes


def write(folder: pathlib.Path, *lines: object) -> pathlib.Path:
  texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
  path = folder / declarations.FILE
  path.write_bytes(gzip.compress(b"\n".join(texts), mtime=0))
  return path


def test_what_is_written_is_read(tmp_path):
  versions = declarations.synthetic(5, words=40)
  file = io.BytesIO()
  declarations.write(file, versions)
  (tmp_path / declarations.FILE).write_bytes(file.getvalue())
  assert declarations.load(tmp_path) == versions
  assert declarations.digest(versions) != declarations.digest(versions[1:])


def test_excerpts_are_left_out(tmp_path, caplog):
  short, few = entry(code="b", articles=[["y"]] * 30), entry(code="c", articles=[["z" * 9_000]])
  write(tmp_path, entry(), short, b"", few)
  assert [v.code for v in declarations.load(tmp_path)] == ["a"]
  assert "has 1 whole versions, and the file that the results were made from 519" in caplog.text


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"{", "no JSON"),
    (b'{"code": "\xff"}', "no JSON"),
    (b"[]", "wanted a JSON object .* got list"),
    ({k: v for k, v in entry().items() if k != "articles"}, "the key 'articles' is missing"),
    (entry(iso639_3=3), "iso639_3 must be a str"),
    (entry(name=""), "name must be a str that is not empty"),
    (entry(articles=[["x"], []]), "article 2 is empty"),
    (entry(articles=[["x"], [" "]]), "article 2 is empty"),
    (entry(articles=[["x"], "y"]), "article 2 must be a list of texts"),
    (entry(articles=[["\0"]]), "article 1 has a zero byte"),
    (entry(), "the code 'a' occurs twice"),
  ],
)
def test_errors_name_the_file_and_the_line(tmp_path, line, message):
  path = write(tmp_path, entry(), line)
  with pytest.raises(DamagedError, match=f"{path}, line 2: .*{message}"):
    declarations.load(tmp_path)


@pytest.mark.parametrize("damage", ("cut", "flipped", "no gzip", "empty"))
def test_damaged_files(tmp_path, damage):
  path = write(tmp_path, *(entry(code=str(n), name=os.urandom(3_000).hex()) for n in range(20)))
  content = bytearray(path.read_bytes())
  if damage == "flipped":
    content[len(content) // 2] ^= 0xFF
  whole = {"cut": content[:-20], "flipped": content, "no gzip": b"{}", "empty": b""}[damage]
  path.write_bytes(whole)
  wanted = "has 0 versions" if damage == "empty" else "line .*damaged or not whole|no JSON"
  with pytest.raises(DamagedError, match=f"{path}.*({wanted})"):
    declarations.load(tmp_path)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path):
  (tmp_path / declarations.FILE).write_bytes(gzip.compress(b" " * 2**26))
  tracemalloc.start()
  with pytest.raises(DamagedError, match="line 1 has more than"):
    declarations.load(tmp_path)
  assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
  tracemalloc.stop()


def test_a_missing_file_and_a_missing_folder(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="does not exist. Give another data_dir"):
    declarations.load(tmp_path)
  monkeypatch.delenv("SHRINKMETA_DATA", raising=False)
  with pytest.raises(FileNotFoundError, match="Where is udhr"):
    declarations.load()


def test_versions_of_a_language_are_on_one_side():
  versions = [*declarations.synthetic(24), *declarations.synthetic(1)]
  versions[-1] = versions[-1]._replace(language=declarations.UNKNOWN)
  for seed in range(5):
    parts = declarations.split(versions, (3, 4, 5), seed)
    languages = [{v.language for v in part} for part in parts]
    assert [len(one) for one in languages] == [3, 4, 5, 13]
    assert len(set.union(*languages)) == 25 and sum(map(len, languages)) == 25
    assert sorted(v.code for part in parts for v in part) == sorted(v.code for v in versions)
    assert declarations.UNKNOWN in languages[-1]
    assert [v.language for v in declarations.one_a_language(parts[2])] == list(
      dict.fromkeys(v.language for v in parts[2])
    )
  first, second = (declarations.split(versions, (3, 4, 5), seed) for seed in (0, 1))
  assert first == declarations.split(versions, (3, 4, 5), 0) and first != second
  with pytest.raises(ValueError, match="wants 20 . 4 languages"):
    declarations.split(versions, (20, 4), 0)


def test_no_text_is_on_two_sides_of_the_split():
  versions = declarations.synthetic(24)
  long = "the same long article under two codes " * 3
  shared = [v._replace(articles=(*v.articles[:-1], long)) for v in versions[:3]]
  short = [v._replace(articles=(*v.articles[:-1], "yes")) for v in versions[3:6]]
  versions = [*shared, *short, *versions[6:]]
  for seed in range(20):
    parts = declarations.split(versions, (3, 4, 5), seed)
    sides = [i for i, part in enumerate(parts) for v in part if long in v.articles]
    assert sides and len(set(sides)) == 1  # the others are left out
    left_out = 3 - len(sides)
    assert sum(map(len, parts)) == len(versions) - left_out
    assert [len({v.language for v in part}) for part in parts[:3]] == [3, 4, 5]
  with pytest.raises(ValueError, match="share their text with others"):
    declarations.split([v._replace(articles=(long,)) for v in versions], (3, 4, 5), 0)


def test_every_byte_is_predicted_once_from_the_byte_before():
  articles = ("abc", "dé", "f")
  text = b"abc\nd\xc3\xa9\nf"
  batch = windows.windows(articles, 4)
  flat = batch.targets.reshape(-1)
  assert bytes(flat[flat != windows.PADDING].astype(np.uint8)) == text
  assert batch.inputs.reshape(-1)[: len(text)].tobytes() == b"\n" + text[:-1]
  assert batch.inputs.shape == (3, 4) and (flat[len(text) :] == windows.PADDING).all()
  assert windows.windows(articles, 4, most=1).inputs.shape == (1, 4)
  several = windows.padded([batch, windows.windows(("a",), 4)], 3)
  np.testing.assert_array_equal(several.mask, [[1, 1, 1], [1, 0, 0]])
  np.testing.assert_array_equal(windows.num_targets(several), [len(text), 1])
  with pytest.raises(ValueError, match="Task 0 has 3 windows; rows is 2"):
    windows.padded([batch], 2)


def test_bits_of_a_uniform_distribution():
  assert windows.bits_per_byte(10 * np.log(256), 10) == pytest.approx(8.0)
  assert windows.bits_per_byte(math.log(2), 2) == pytest.approx(0.5)


@pytest.mark.skipif("SHRINKMETA_DATA" not in os.environ, reason="SHRINKMETA_DATA is not set")
def test_the_published_file():
  folder = pathlib.Path(os.environ["SHRINKMETA_DATA"]) / "udhr"
  if not folder.exists():
    pytest.skip("SHRINKMETA_DATA has no folder udhr")
  versions = declarations.load(folder)
  assert (len(versions), len({v.language for v in versions})) == (519, 438)
  with gzip.open(folder / "declarations.jsonl.gz") as file:
    articles = {one["code"]: one["articles"] for one in map(json.loads, file)}
  want = [sum(len("\n".join(a).encode()) for a in articles[v.code]) for v in versions]
  assert [declarations.num_bytes(v.articles) for v in versions] == want
