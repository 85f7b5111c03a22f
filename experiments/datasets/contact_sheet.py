"""A picture of one task, to look at."""

import numpy as np

from shrinkmeta import Task


def contact_sheet(task: Task, columns: int = 20) -> np.ndarray:
  """Return one task as a picture: one row for each class, train on the left and val on the right.

  `PIL.Image.fromarray(contact_sheet(task)).save("task.png")`. A value of 1 in a grey picture is
  ink, which is shown black.

  Args:
    task: inputs [N, H, W, 1 or 3] in [0, 1] and labels, with equally many examples of each class.
    columns: the largest number of pictures of a class in each part.

  Returns:
    [height, width] grey or [height, width, 3], uint8.
  """
  shape = np.shape(task.train.inputs)
  if len(shape) != 4:
    raise ValueError(
      f"contact_sheet wants one task with inputs [N, H, W, C]; got {shape}. Of a batch of tasks "
      "take one: jax.tree.map(lambda leaf: leaf[0], tasks)."
    )
  sides = []
  for batch in task:
    images = np.asarray(batch.inputs)
    images = 1.0 - images if images.shape[-1] == 1 else images
    ways = int(np.max(np.asarray(batch.targets))) + 1
    images = images[np.argsort(np.asarray(batch.targets), kind="stable")]
    cells = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=0.7)
    cells = cells.reshape(ways, -1, *cells.shape[1:])[:, :columns]
    ways, n, height, width, channels = cells.shape
    sides.append(cells.transpose(0, 2, 1, 3, 4).reshape(ways * height, n * width, channels))
  gap = np.zeros((len(sides[0]), 3, sides[0].shape[-1]))
  sheet = np.rint(255 * np.clip(np.hstack([sides[0], gap, sides[1]]), 0, 1)).astype(np.uint8)
  return sheet[..., 0] if sheet.shape[-1] == 1 else sheet
