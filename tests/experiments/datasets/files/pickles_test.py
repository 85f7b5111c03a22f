"""Tests of the reader of pickles: what it reads, and what it refuses."""

import collections
import io
import os
import pathlib
import pickle
import resource
import struct
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from experiments.datasets.files import pickles

# b"\xc3\xa9" as a str of Python 2, and an array as its NumPy pickled it at protocol 2.
PYTHON_2 = (
  b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
  b"K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x02K\x02\x86q\x08cnumpy\ndtype\nq\tU\x02u1q\n"
  b"K\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89"
  b"U\x04\x00\x80\xff\x01q\x0ftq\x10bU\x04nameq\x11U\x02\xc3\xa9q\x12u."
)


class Call:
  """Asks a pickle to call something."""

  def __init__(self, *call):
    self.call = call

  def __reduce__(self):
    return self.call[0], self.call[1:]


class PicklesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / "x.pkl"

  def load(self, content):
    self.path.write_bytes(content)
    return pickles.load(self.path)

  @parameterized.product(
    protocol=list(range(pickle.HIGHEST_PROTOCOL + 1)),
    array=[
      np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
      np.asfortranarray(np.arange(6.0).reshape(2, 3)),
      np.arange(4, dtype=">i4"),
      np.array(["a", "bcd"]),
      np.array([True, False]),
      np.array(["a", 1, None], object),
      np.zeros((0, 3), np.float32),
    ],
  )
  def test_arrays(self, protocol, array):
    got = self.load(pickle.dumps({"x": [array, array], "n": array.dtype}, protocol))
    for copy in got["x"]:
      np.testing.assert_array_equal(copy, array)
      self.assertEqual((copy.dtype, copy.shape), (array.dtype, array.shape))
    self.assertEqual(got["n"], array.dtype)

  @parameterized.product(protocol=list(range(pickle.HIGHEST_PROTOCOL + 1)))
  def test_plain_data(self, protocol):
    scalar = np.int64(7)
    data = {"a": [1, 2.5, None, True, (1, "ü")], b"k": b"\x00\xff", scalar: {"n": scalar}}
    got = self.load(pickle.dumps(data, protocol))
    self.assertEqual(got, data)
    self.assertIsInstance(got[7]["n"], np.int64)

  def test_python_2(self):
    got = self.load(PYTHON_2)
    np.testing.assert_array_equal(got["data"], np.array([[0, 128], [255, 1]], np.uint8))
    self.assertEqual(got["name"], "\xc3\xa9")  # a byte a character
    # The same bytes mean the same to NumPy itself.
    np.testing.assert_array_equal(got["data"], pickle.loads(PYTHON_2, encoding="latin1")["data"])

  def hostile(self, *call) -> bytes:
    return pickle.dumps({"image_data": Call(*call)})

  def test_nothing_is_called(self):
    marker = self.folder / "marker"
    for call, name in (
      ((os.system, f"touch {marker}"), r"(posix|nt)\.system"),
      ((eval, f"open({str(marker)!r}, 'w')"), r"builtins\.eval"),
      ((pathlib.Path.touch, marker), r"the global"),
      ((getattr, "x", "upper"), r"builtins\.getattr"),
      ((np.load, str(self.path)), r"the global numpy"),
      ((collections.OrderedDict,), r"collections\.OrderedDict"),
      ((set, [1]), r"builtins\.set"),
    ):
      with self.assertRaisesRegex(ValueError, f"{self.path} asks for .*{name}.*original source"):
        self.load(self.hostile(*call))
    self.assertFalse(marker.exists())

  def test_other_encodings_are_refused(self):
    content = b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00abX\x05\x00\x00\x00rot13\x86R."
    with self.assertRaisesRegex(ValueError, "encoding 'rot13'"):
      self.load(content)

  def test_structured_arrays_are_refused(self):
    with self.assertRaisesRegex(ValueError, "dtype 'V5'"):
      self.load(pickle.dumps(np.zeros(2, "u1, f4")))
    with self.assertRaisesRegex(ValueError, "dtype 'M8'"):
      self.load(pickle.dumps(np.zeros(2, "M8[s]")))

  def test_a_state_cannot_change_what_reads_it(self):
    # BUILD on the classes that stand for globals, with attributes to set on them.
    for name in (b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"cnumpy.core.multiarray\nscalar\n"):
      attack = b"\x80\x02" + name + b"N}U\x08__init__U\x01xs\x86b."
      with self.assertRaisesRegex(ValueError, "no whole pickle|asks for"):
        self.load(attack)
    self.assertEqual(self.load(pickle.dumps([b"\xff", np.int8(3)], 2)), [b"\xff", 3])

  def test_content_must_fit_the_shape(self):
    content = pickle.dumps(np.arange(200, dtype=np.uint8), 2)
    for wrong in (content.replace(b"K\xc8\x85", b"K\xc9\x85", 1),):
      self.assertNotEqual(wrong, content)
      with self.assertRaisesRegex(ValueError, "no whole pickle"):
        self.load(wrong)

  @parameterized.parameters(0, 1, 10, -1)
  def test_truncated(self, length):
    content = pickle.dumps({"data": np.arange(5)})[:length]
    with self.assertRaisesRegex(ValueError, f"{self.path} is no whole pickle"):
      self.load(content)

  def test_missing(self):
    with self.assertRaises(FileNotFoundError):
      pickles.load(self.path)

  def test_a_list_in_itself_ends(self):
    loop = []
    loop.append(loop)
    with self.assertRaisesRegex(ValueError, "no whole pickle"):
      self.load(pickle.dumps(loop))

  def test_a_small_file_takes_little_memory(self):
    text = b"X\x40\x42\x0f\x00" + b"a" * 1_000_000 + b"q\x00"
    dtype = pickle.dumps(np.dtype("u1"), 2)[2:-1] + b"q\x01"
    call = b"cnumpy.core.numeric\n_frombuffer\n("
    half = b"(I500000000\nt"
    for content, message in (
      (b"\x80\x02]r" + struct.pack("<I", 100_000_000) + b".", None),  # an index of the memo
      (b"\x80\x02]p100000000\n.", None),
      (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "no whole pickle"),  # bytes
      (b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b"x.", "no whole pickle"),  # a bytearray
      (b"\x80\x02" + call + b"U\x01a" + dtype + b"(]K\x00aI900000000\ntU\x01CtR.", "a shape"),
      (b"\x80\x02" + call + b"U\x01a" + dtype + half + b"U\x01CtR.", "asks for more than"),
      # A million characters made bytes two thousand times.
      (b"\x80\x02" + text + b"0](" + 2000 * b"c_codecs\nencode\nh\x00\x85R" + b"e.", "more than"),
    ):
      before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      if message is None:
        self.assertEqual(self.load(content), [])
      else:
        with self.assertRaisesRegex(ValueError, message):
          self.load(content)
      grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
      self.assertLess(grown, 200_000)  # KiB

  def test_what_is_shared_is_made_once_and_counted_as_often_as_it_is_met(self):
    def shared(levels):
      value = ["a"]
      for _ in range(levels):
        value = [value, value]
      return pickle.dumps(value, 2)

    got = self.load(shared(15))
    self.assertIs(got[0], got[1])
    self.assertEqual(np.shape(got), (2,) * 15 + (1,))
    for levels in (25, 80):
      with self.assertRaisesRegex(ValueError, "more than 1000000 values and bytes, much of it"):
        self.load(shared(levels))
    many = [np.zeros(100_000, np.uint8)] * 1000
    with self.assertRaisesRegex(ValueError, "much of it shared"):
      self.load(pickle.dumps(many))

  @parameterized.parameters(1, 2, 3)
  def test_keys_are_no_tuples(self, size):
    key = {1: b"\x85", 2: b"2\x86", 3: b"22\x87"}[size]  # of the value below, that often
    for rest in (b"K\x00s.", b"K\x00u.", b"K\x00d."):
      start = {b"s": b"}N", b"u": b"}(N", b"d": b"(N"}[rest[2:3]]
      with self.assertRaisesRegex(ValueError, "a key of type tuple"):
        self.load(b"\x80\x02" + start + 100_000 * key + rest)

  def test_objects_sets_and_persistent_values_are_refused(self):
    for content in (
      b"(icollections\nOrderedDict\n.",
      b"Pabc\n.",
      b"\x80\x04\x8f.",
      b"\x80\x02\x82\x01.",
    ):
      with self.assertRaisesRegex(ValueError, "asks for an object, a set"):
        self.load(content)

  def test_a_large_set_is_quick(self):
    many = [np.arange(100, dtype=np.uint8)] * 3 + [
      np.frombuffer(os.urandom(100), np.uint8) for _ in range(2000)
    ]
    buffer = io.BytesIO()
    pickle.dump(many, buffer, 2)
    got = self.load(buffer.getvalue())
    np.testing.assert_array_equal(np.stack(got), np.stack(many))


if __name__ == "__main__":
  absltest.main()
