"""From a formula to answers: a fit, its summary, predictions."""
