"""Tests of the errors for damaged files, and of tables."""

import errno
import lzma
import pathlib
import tempfile
import zipfile
import zlib

from absl.testing import absltest, parameterized

from experiments.datasets.files import cache


class DamagedTest(parameterized.TestCase):
  @parameterized.parameters(
    OSError(errno.EINVAL, "Invalid argument"),
    NotImplementedError("compression type 77"),
    RuntimeError("a password"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    KeyError("images.npy"),
    *(EOFError(), MemoryError(), SyntaxError(), zlib.error(), lzma.LZMAError()),
    zipfile.BadZipFile("bad CRC"),
  )
  def test_whatever_is_raised_becomes_one_error_that_names_the_file(self, error):
    with self.assertRaisesRegex(ValueError, "^a/b.zip: damaged .*Download it anew") as caught:
      with cache.damaged("a/b.zip"):
        raise error
    self.assertIs(caught.exception.__cause__, error)

  def test_what_names_its_file_passes(self):
    with self.assertRaisesRegex(cache.DamagedError, "^a.zip, x.png: ((?!a.zip).)*$"):
      with cache.damaged("a.zip"), cache.damaged("a.zip, x.png"):
        raise EOFError
    with self.assertRaises(FileNotFoundError), cache.damaged("a.zip"):
      pathlib.Path("/nowhere/a.zip").read_bytes()
    with self.assertRaises(NameError), cache.damaged("a.zip"):
      raise NameError("a mistake in a program is no damage")


class ReadCsvTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "x.csv"

  def read(self, content):
    self.path.write_bytes(content)
    return cache.read_csv(self.path, ("name", "label"))

  def test_rows(self):
    got = self.read('label,other,name\r\n1,,"ü, v"\r\n\r\n2,x,w\r\n'.encode())
    self.assertEqual([(row["name"], row["label"]) for row in got], [("ü, v", "1"), ("w", "2")])
    self.assertEmpty(self.read(b"name,label\n"))
    marked = self.read(b"\xef\xbb\xbfname,label\nv,1\n")  # as spreadsheets write UTF-8
    self.assertEqual(marked, [{"name": "v", "label": "1"}])

  @parameterized.parameters(
    (b"", "under the header name,label; got ''"),
    (b"name,lab\xc3\xa9l\na,1\n", "under the header name,label"),
    (b"a,1\nb,2\n", "got 'a,1'"),
    (b"name,label\na,1\nb", r"wants 2 columns in each row; got \['b'\]"),
    (b"name,label\na,1,\n", "wants 2 columns"),
    (b'name,label\na,"1\n', "damaged or not whole"),
    (b"name,label\na,\xff\n", "damaged or not whole, UnicodeDecodeError"),
  )
  def test_damaged(self, content, message):
    with self.assertRaisesRegex(ValueError, f"^{self.path}.*{message}.*Download it anew"):
      self.read(content)

  def test_missing(self):
    with self.assertRaisesRegex(FileNotFoundError, f"{self.path} does not exist. Give another"):
      cache.read_csv(self.path, ("name",))


if __name__ == "__main__":
  absltest.main()
