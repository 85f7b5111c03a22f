"""Fit linear and generalised linear mixed models, summarise them, and predict with them.

    model = mixed.fit("y ~ x + (x | g)", "data.csv", estimator="reml")
    print(model)

`fit` takes a formula and a table. `design` makes matrices from a formula and a table, and
`fit_design` takes these matrices.
"""

from shrinkmeta.formulas.build import design as design
from shrinkmeta.formulas.design import Design as Design
from shrinkmeta.formulas.design import RandomTerm as RandomTerm
from shrinkmeta.formulas.table import Table as Table
from shrinkmeta.formulas.table import read as read
from shrinkmeta.mixed.answers.model import Model as Model
from shrinkmeta.mixed.answers.model import compare as compare
from shrinkmeta.mixed.answers.model import effects as effects
from shrinkmeta.mixed.answers.model import fit as fit
from shrinkmeta.mixed.answers.model import profile as profile
from shrinkmeta.mixed.answers.model import summary as summary
from shrinkmeta.mixed.answers.model import unshrunk as unshrunk
from shrinkmeta.mixed.answers.predict import Predictions as Predictions
from shrinkmeta.mixed.answers.predict import predict as predict
from shrinkmeta.mixed.answers.predict import residuals as residuals
from shrinkmeta.mixed.answers.summary import Summary as Summary
from shrinkmeta.mixed.compare import Compared as Compared
from shrinkmeta.mixed.compare import Ratio as Ratio
from shrinkmeta.mixed.criteria.families import Family as Family
from shrinkmeta.mixed.fit import fit as fit_design
from shrinkmeta.mixed.groups import Effects as Effects
from shrinkmeta.mixed.result import Estimator as Estimator
from shrinkmeta.mixed.result import Fit as Fit

__all__ = (
  "Compared",
  "Design",
  "Effects",
  "Estimator",
  "Family",
  "Fit",
  "Model",
  "Predictions",
  "RandomTerm",
  "Ratio",
  "Summary",
  "Table",
  "compare",
  "design",
  "effects",
  "fit",
  "fit_design",
  "predict",
  "profile",
  "read",
  "residuals",
  "summary",
  "unshrunk",
)
