"""Pickles of encoded pictures, and wrong labels."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from experiments.datasets.files import layouts

SEEN = np.stack([np.arange(96, dtype=np.uint8).reshape(8, 12)] * 3, -1)


def encoded(kind, **options):
  buffer = io.BytesIO()
  Image.fromarray(SEEN).save(buffer, kind, **options)
  return buffer.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=100)
FORMS = {
  "bytes": bytes,
  "a bytearray": bytearray,
  "an array": lambda content: np.frombuffer(content, np.uint8),
  "a column, as of OpenCV": lambda content: np.frombuffer(content, np.uint8)[:, None],
  "bytes of NumPy": np.bytes_,
  "bytes of Python 2": lambda content: content.decode("latin1"),
}
LISTS = {
  "a list": list,
  "an array of objects": lambda x: np.array([*x, None], object)[:-1],
}


@pytest.mark.parametrize("protocol", (2, 3, 5))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", LISTS)
def test_encoded_pictures_in_every_pickle(tmp_path, form, many, protocol):
  path, labels = tmp_path / "x.pkl", tmp_path / "labels.pkl"
  content = LISTS[many]([FORMS[form](PNG), FORMS[form](JPEG)])
  labels.write_bytes(pickle.dumps({"label_specific": [0, 1]}))
  for read, data, also in (
    (layouts.png_pickle, content, (labels,)),
    (layouts.class_dict, {"image_data": content, "class_dict": {"a": [0], "b": [1]}}, ()),
    (layouts.data_labels, {"data": content, "labels": [0, 1]}, ()),
  ):
    path.write_bytes(pickle.dumps(data, protocol))
    listing = read(path, *also)
    assert len(listing.labels) == 2
    np.testing.assert_array_equal(listing.read(0), SEEN)
    np.testing.assert_allclose(listing.read(1), SEEN, atol=3)


def test_an_array_of_bytes(tmp_path):
  path = tmp_path / "x.pkl"
  path.write_bytes(pickle.dumps({"data": np.array([PNG, PNG]), "labels": [0, 1]}))
  np.testing.assert_array_equal(layouts.data_labels(path).read(1), SEEN)


@pytest.mark.parametrize(
  "picture, message",
  (
    (PNG[:60], "picture 1: damaged or not whole"),
    (
      b"BM, another format",
      "picture 1: .*neither a PNG nor a JPEG; its first bytes are b'BM, anot",
    ),
    (np.zeros((4, 4, 3), np.uint8), r"picture 1: wanted .*; got an array \(4, 4, 3\) of uint8"),
    (7, "picture 1: wanted a PNG or JPEG as bytes .*; got int"),
  ),
)
def test_a_picture_that_cannot_be_read_is_named(tmp_path, picture, message):
  path = tmp_path / "x.pkl"
  path.write_bytes(pickle.dumps({"data": [PNG, picture], "labels": [0, 1]}))
  listing = layouts.data_labels(path)
  with pytest.raises(ValueError, match=f"^{path}, {message}"):
    listing.read(1)


def read_labels(tmp_path, labels):
  path = tmp_path / "x.pkl"
  data = np.zeros((len(labels), 4, 4, 3), np.uint8)
  path.write_bytes(pickle.dumps({"data": data, "labels": labels}))
  return layouts.data_labels(path).labels


@pytest.mark.parametrize(
  "labels",
  ([3, 10, 0], np.array([3, 10, 0]), np.array([3.0, 10.0, 0.0]), [np.int64(3), 10.0, np.uint8(0)]),
)
def test_numbers_are_classes_whatever_their_type(tmp_path, labels):
  assert read_labels(tmp_path, labels) == ["0003", "0010", "0000"]


def test_texts_are_classes(tmp_path):
  assert read_labels(tmp_path, ["cat", b" dog", np.str_("cow ")]) == ["cat", "dog", "cow"]


@pytest.mark.parametrize("label", (-1, np.nan, 0.5, None, "", " ", np.inf, [1]))
def test_a_label_that_is_no_class_is_named(tmp_path, label):
  with pytest.raises(ValueError, match=r"x.pkl wants labels .* from 0; that of picture 1 is "):
    read_labels(tmp_path, [0, label, 2])


def test_a_picture_of_a_table_without_a_label_is_named(tmp_path):
  (tmp_path / "images").mkdir()
  path = tmp_path / "train.csv"
  path.write_text("filename,label\na.png,cat\nb.png,\n")
  with pytest.raises(ValueError, match="train.csv: 'b.png' has no label"):
    layouts.csv(path, tmp_path / "images")
