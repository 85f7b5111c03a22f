"""A check, shared by the tests of pictures, that every text of a figure is readable."""

import itertools

from matplotlib.text import Text

LONG = "encoder/block_{}/self_attention/$query_{}$"  # a name that mathematics must not rewrite


def texts(figure):
  """The texts that a drawing of the figure shows."""
  figure.draw_without_rendering()
  found = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
  inside = lambda t: t.axes is None or t.get_transform() is not None
  return [t for t in found if inside(t) and _is_shown(t)]


def _is_shown(text):
  """False for a tick label outside its axis, which matplotlib keeps and does not draw."""
  for axis in (a for ax in text.figure.axes for a in (ax.xaxis, ax.yaxis)):
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    if any(text in (tick.label1, tick.label2) for tick in ticks):
      drawn = axis._update_ticks()
      return any(text in (tick.label1, tick.label2) for tick in drawn)
  return True


def check_texts(figure, *names):
  """Every name is written as it is, no two texts overlap, and none leaves the figure."""
  shown = texts(figure)
  boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
  for name in names:
    own = [t for t in shown if name in t.get_text()]
    assert own, f"{name} is not written"
    assert not any(t.get_parse_math() for t in own if "$" in name), f"{name} is read as a formula"
  for text, box in boxes:
    inside = box.x0 >= -1 and box.y0 >= -1
    inside &= box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1
    assert inside, f"{text!r} leaves the figure: {box}"
  for (a, box), (b, other) in itertools.combinations(boxes, 2):
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    # The box of a line of text has room above and below its letters.
    assert width <= 1 or height <= 3, f"{a!r} and {b!r} overlap by {width:.1f} x {height:.1f}"
