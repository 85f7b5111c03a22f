"""Text files with any separator, decimal sign, encoding and missing values."""

import fractions
import gzip

import numpy as np
import pandas as pd
import pytest

from shrinkmeta.formulas.columns import find, is_missing, numbers
from shrinkmeta.formulas.table import as_table, read


@pytest.fixture
def file(tmp_path):
  def write(content, name="data.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    return path

  return write


def labels(table, name):
  column = table.columns[name]
  return [None if i < 0 else column.levels[i] for i in column.values]


@pytest.mark.parametrize("sep", ",;\t")
@pytest.mark.parametrize("end", ("\n", "\r\n", "\r"))
def test_separators_are_found(file, sep, end):
  rows = (("y", "größe", "g"), ("1.5", "2", "a"), ("2.5", "3", "b"), ("", "", ""))
  table = read(file(end.join(map(sep.join, rows)) + end + end))
  assert list(table.columns) == ["y", "größe", "g"] and table.rows == 3
  np.testing.assert_array_equal(numbers(table, "y", "y"), [1.5, 2.5, np.nan])
  assert table.lines.tolist() == [2, 3, 4]


def test_other_separators_are_named(file):
  assert read(file("y|g\n1|a\n"), sep="|").columns["g"].levels == ("a",)
  assert list(read(file("y  g \n1    a\n"), sep="space").columns) == ["y", "g"]
  assert list(read(file("y\tg\n1\ta\n"), sep="\\t").columns) == ["y", "g"]
  with pytest.raises(ValueError, match="one character"):
    read(file("y,g\n"), sep="::")
  with pytest.raises(ValueError, match="comma or by semicolon"):
    read(file("a,b;c\n1,2;3\n"))


@pytest.mark.parametrize(
  "content, decimal",
  (
    ("y;g\n1,5;a\n2;b\n", ","),
    ("y;g\n1.5;a\n2;b\n", "."),
    ("y;g\n1,234;a\n", ","),  # semicolons are there because of decimal commas
    ("y\tg\n1,5\ta\n", ","),
    ("y\tg\n1,234\ta\n", "."),  # a thousand, or not: an error where it is used
    ('y,g\n"1,5",a\n', ","),
    ("y;g\n1,5e-3;a,b\n", ","),
  ),
)
def test_a_decimal_comma_is_found(file, content, decimal):
  assert read(file(content)).decimal == decimal


def test_decimal_signs_in_doubt(file):
  with pytest.raises(ValueError, match="such as 1,5 and such as 2.5: pass decimal"):
    read(file("y;x\n1,5;2.5\n"))
  table = read(file("y;x\n1,5;2.5\n"), decimal=",")
  assert numbers(table, "y", "y") == [1.5]
  with pytest.raises(ValueError, match=r"'2.5' in row 1 \(line 2 of data.csv\).*decimal='.'"):
    numbers(table, "x", "a term")
  with pytest.raises(ValueError, match="'1,234'.*decimal=','"):
    numbers(read(file("y\tg\n1,234\ta\n")), "y", "the response")


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16"))
def test_encodings_that_are_found(file, encoding):
  assert read(file("größe,g\n1,ä\n", encoding=encoding)).columns["g"].levels == ("ä",)


def test_other_encodings(file):
  path = file("y,größe\n1,2\n", "latin.csv", "latin-1")
  with pytest.raises(ValueError, match=r"latin.csv is not UTF-8 text: line 1 has .*latin-1"):
    read(path)
  assert list(read(path, encoding="latin-1").columns) == ["y", "größe"]
  with pytest.raises(ValueError, match="no encoding 'latin-x'"):
    read(path, encoding="latin-x")
  with pytest.raises(ValueError, match="utf-16-le"):
    read(file("y,g\n1,a\n", encoding="utf-16-le"))
  path.write_bytes(b"PK\x03\x04rest")
  with pytest.raises(ValueError, match="workbook"):
    read(path)


def test_comments_quotes_and_the_lines_of_rows(file):
  content = '# made by hand\ny,"a ""b"", c"\n\n1,"two\nlines"\n# note\n2,x\n'
  table = read(file(content), comment="#")
  assert labels(table, 'a "b", c') == ["two\nlines", "x"] and table.lines.tolist() == [4, 7]
  with pytest.raises(ValueError, match="comment='#'"):
    read(file("# made by hand\ny,g\n1,a\n"))


@pytest.mark.parametrize(
  "content, message",
  (
    ("", "no rows"),
    ("y,x\n", "no rows"),
    ("\n\n", "no rows"),
    ("y,y\n1,2\n", "name twice: y"),
    ("y, y\n1,2\n", "name twice: y"),
    ("y,x\n1,2\n3\n", r"row 2 \(line 3\): 1 fields, but there are 2 column names, y, x"),
    ("y,x\n1,2\n\n3,4,5\n", r"row 2 \(line 4\): 3 fields"),
    ("y,x\n1,2,3\n3,4,5\n", "Give the first column a name"),
    ('y,x\n1,"2\n3,4\n', "cannot be read as a CSV file"),
  ),
)
def test_broken_files_are_named_with_their_row(file, content, message):
  with pytest.raises(ValueError, match=message) as error:
    read(file(content))
  assert "data.csv" in str(error.value)


def test_no_file(tmp_path):
  with pytest.raises(ValueError, match="no file"):
    read(tmp_path / "nothing.csv")
  with pytest.raises(ValueError, match="no file"):
    read(tmp_path)


@pytest.mark.parametrize(
  "text", ("NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "-nan", "NULL", "None", "NaT", ".", "")
)
def test_what_programs_write_for_a_missing_value(file, text):
  table = read(file(f'y,g\n1,a\n2,"{text}"\n'))
  assert labels(table, "g") == ["a", None]
  assert labels(as_table({"g": ["a", text]}), "g") == ["a", None]


def test_other_spellings_take_their_place(file):
  content = "y,g\n-999,NA\n2,\n"
  table = read(file(content), na=["-999"])
  assert is_missing(table.columns["y"]).tolist() == [True, False]
  assert labels(table, "g") == ["NA", None]  # Namibia


def test_labels_stay_as_they_are(file):
  kept = ["007", "1e5", "True", "01.10", "1_000", "TRUE", "inf", "0x1F", "1,000"]
  content = "g\ty\n" + "".join(f"{label}\t1\n" for label in kept)
  assert labels(read(file(content)), "g") == kept


@pytest.mark.parametrize(
  "values, shown",
  (
    ([3, 1], [3.0, 1.0]),
    ([3.5, None], [3.5, np.nan]),
    (np.array([1, 2], np.int8), [1.0, 2.0]),
    (pd.Series([1, None], dtype="Int64"), [1.0, np.nan]),
    (pd.Series([1.0, 2.0], index=[5, 3]), [1.0, 2.0]),
    (np.ma.array([999.0, 2.0], mask=[True, False]), [np.nan, 2.0]),
    (np.ma.array([999, 2], mask=[True, False]), [np.nan, 2.0]),
    (np.ma.array([1, 2]), [1.0, 2.0]),
    ([np.ma.masked, 2.0], [np.nan, 2.0]),
    (np.array([np.float32(0.5), np.int8(2), None], object), [0.5, 2.0, np.nan]),
    (np.float32([0.1, 2]), [float(np.float32(0.1)), 2.0]),
  ),
)
def test_numbers_of_arrays(values, shown):
  column = as_table({"y": values}).columns["y"]
  assert column.levels is None
  np.testing.assert_array_equal(column.values, shown)


@pytest.mark.parametrize(
  "values, shown",
  (
    (["a", None], ["a", None]),
    (["007", "1e5"], ["007", "1e5"]),
    ([True, False], ["True", "False"]),
    (pd.Series(["b", None, "a"], dtype="category"), ["b", None, "a"]),
    (pd.Series(["b", pd.NA], dtype="string"), ["b", None]),
    (pd.Categorical(["low", "none"], ["low", "none"]), ["low", "none"]),
    (np.array([b"a", b"NA", "ä".encode()]), ["a", None, "ä"]),
    ([b"a", None, b" b "], ["a", None, "b"]),
    (pd.Categorical([b"a", None, b"b"]), ["a", None, "b"]),
    (pd.Categorical([3.0, None, 1.5]), ["3", None, "1.5"]),
    (pd.Categorical(np.float32([0.1, 3])), ["0.1", "3"]),
    (pd.Categorical([None, None]), [None, None]),
  ),
)
def test_texts_of_arrays(values, shown):
  assert labels(as_table(pd.DataFrame({"g": values})), "g") == shown
  assert labels(as_table({"g": values}), "g") == shown


@pytest.mark.parametrize(
  "values, shown",
  (
    (np.array(["a", "b"]), ["a", None]),
    (np.array([b"a", b"b"]), ["a", None]),
    (np.array([True, False]), ["True", None]),
    (np.array(["2020-01-01", "1999-01-01"], "M8[ns]"), ["2020-01-01", None]),
    (np.array([86400, 5], "m8[s]"), ["1 days", None]),
  ),
)
def test_masked_entries_are_missing_values(values, shown):
  masked = np.ma.array(values, mask=[False, True])
  assert labels(as_table({"g": masked}), "g") == shown
  assert labels(as_table({"g": list(np.ma.array(["a", "b"], mask=[0, 1]))}), "g") == ["a", None]
  assert masked.data.tolist() == values.tolist()  # the caller's array is as before


def test_fractions_are_numbers_and_complex_numbers_are_refused():
  table = as_table({"y": [fractions.Fraction(1, 3), fractions.Fraction(1, 2), None]})
  np.testing.assert_array_equal(numbers(table, "y", "y"), [1 / 3, 0.5, np.nan])
  for values in ([1j, 2.0], np.array([1j, 2.0]), np.array([1j], np.complex64)):
    with pytest.raises(ValueError, match="Column 'y' has the complex number .*1j.*real numbers"):
      as_table({"y": values})


def test_bytes_are_text_in_utf_8():
  assert as_table({b"g": [1.0], "ä".encode(): [2.0]}).columns.keys() == {"g", "ä"}
  np.testing.assert_array_equal(numbers(as_table({"y": [b"1.5", b"2"]}), "y", "y"), [1.5, 2.0])
  with pytest.raises(ValueError, match=r"Column 'g' has the bytes b'\\xe4'.*not UTF-8.*latin-1"):
    as_table({"g": ["ä".encode("latin-1")]})


@pytest.mark.parametrize(
  "data, error, message",
  (
    ({"y": [1], "x": [1, 2]}, ValueError, "equal lengths"),
    ({"y": np.ones((2, 2))}, ValueError, r"shape \(2, 2\)"),
    ({"y": []}, ValueError, "no rows"),
    ({}, ValueError, "no rows"),
    (pd.DataFrame([[1, 2]], columns=["y", "y"]), ValueError, "twice|shape"),
    ([1, 2], TypeError, "a path, .name: values., .*got list"),
  ),
)
def test_what_is_no_table(data, error, message):
  with pytest.raises(error, match=message):
    as_table(data)


def test_numbers_that_are_none(file):
  table = read(file("y,x,z\n1_0,1e300,inf\n2,3,4\n"))
  for name, message in (("y", "'1_0' in row 1"), ("x", "huge"), ("z", "infinite.*row 1")):
    with pytest.raises(ValueError, match=f"Column '{name}'.*{message}"):
      numbers(table, name, "the response")


def test_a_large_file_is_read_quickly(file):
  import time

  rng = np.random.default_rng(0)
  rows = zip(rng.normal(size=73_000), rng.integers(0, 1128, 73_000), strict=True)
  path = file("y,g\n" + "".join(f"{y:.5f},s{g}\n" for y, g in rows))
  begin = time.process_time()
  table = read(path)
  assert numbers(table, "y", "y").shape == (73_000,) and len(table.columns["g"].levels) == 1128
  assert time.process_time() - begin < 3.0


def test_long_whole_numbers_stay_different_labels():
  ids = np.arange(6) + 10**17
  missing = pd.Series(ids, dtype="Int64").mask(ids == ids[0])
  for column, groups in ((ids, 6), (missing, 5), ([int(i) * 10**9 for i in ids], 6)):
    found = as_table({"id": column}).columns["id"]
    assert len(found.levels) == groups
    assert is_missing(found).sum() == 6 - groups
  np.testing.assert_allclose(numbers(as_table({"id": ids}), "id", "a term"), ids.astype(float))


def test_a_first_line_may_name_the_separator(file):
  table = read(file("sep=;\r\ny;g\r\n1,5;a\r\n"))
  assert table.columns["y"].levels == ("1,5",) and table.lines.tolist() == [3]
  assert read(file('"sep=|"\ny|g\n1|a\n')).columns["g"].levels == ("a",)


def test_quotes_after_a_space(file):
  table = read(file('y, g\n1, "a, b"\n2, c\n'))
  assert table.columns["g"].levels == ("a, b", "c")


def test_files_that_are_no_such_text_say_what_to_do(tmp_path, file):
  path = tmp_path / "data.csv.gz"
  with gzip.open(path, "wt") as opened:
    opened.write("y,g\n1,a\n")
  with pytest.raises(ValueError, match="compressed; unpack it"):
    read(path)
  with pytest.raises(ValueError, match="encoding utf-16-le"):
    read(file("y,größe\n1,a\n", encoding="utf-16-le"))
  with pytest.raises(ValueError, match="separates the columns, pass sep"):
    read(file('"y" "g"\n1 "a"\n'))
  with pytest.raises(ValueError, match="sep='space'"):
    find(read(file("y g\n1 a\n")), "y", "the response")
