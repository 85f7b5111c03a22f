"""See `page`."""

from absl import app

from experiments.report import page

if __name__ == "__main__":
  app.run(page.main)
