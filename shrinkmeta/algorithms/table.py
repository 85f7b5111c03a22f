"""The table of algorithms: the value of sigma, the objective of phi, the gradient of theta_hat.

===============  ======================  ===========  ====================================
algorithm        sigma                   phi follows  gradient of theta_hat
===============  ======================  ===========  ====================================
maml             inf                     l_PLL        through the steps
fomaml           inf                     l_PLL        d theta_hat/d phi = I
imaml            fixed                   l_PLL        implicit
reptile          inf                     l_MAP        none needed
sigma_maml       learned                 l_PLL        through the steps
sigma_imaml      learned                 l_PLL        implicit
sigma_reptile    learned                 l_MAP        implicit, for sigma
meta_sgd         learned, as step sizes  l_PLL        through the steps
empirical_bayes  learned                 evidence     implicit; sigma follows the evidence
hand_picked      mask                    l_PLL        through the steps
anil, boil       mask                    l_PLL        through the steps
fine_tuning      inf                     pooled data  none: no adaptation in training
no_adaptation    mask                    pooled data  none: theta_hat = phi
===============  ======================  ===========  ====================================

"phi follows" names the objective whose gradient updates phi. l_PLL is the log-likelihood of the
validation examples at theta_hat. l_MAP is the log joint density of theta_hat and the training
examples. "Pooled data" is the log-likelihood of all examples of all tasks at theta = phi. The
evidence is log p(training examples | phi, sigma), with theta integrated out. A mask gives sigma =
inf to the task-specific modules and 0 to the frozen ones.

To add an algorithm, write a line here and a constructor in a file of this folder.
`config.Algorithm` lists the words that a line may use, and `config.check_algorithm` checks their
combination. A new kind of gradient needs a function in gradients/per_task.py, and `gradient_of`
there must choose it.
"""

from shrinkmeta.config import Algorithm

FAMILY: dict[str, Algorithm] = {
  "maml": Algorithm("inf", "predictive", "unrolled"),
  "fomaml": Algorithm("inf", "predictive", "first_order"),
  "imaml": Algorithm("fixed", "predictive", "implicit"),
  "reptile": Algorithm("inf", "map", "none"),
  "sigma_maml": Algorithm("learned", "predictive", "unrolled"),
  "sigma_imaml": Algorithm("learned", "predictive", "implicit"),
  "sigma_reptile": Algorithm("learned", "map", "implicit"),
  "meta_sgd": Algorithm("learned", "predictive", "unrolled", prior=False),
  "empirical_bayes": Algorithm("learned", "evidence", "implicit"),
  "hand_picked": Algorithm("inf", "predictive", "unrolled"),
  "anil": Algorithm("inf", "predictive", "unrolled"),
  "boil": Algorithm("inf", "predictive", "unrolled"),
  "fine_tuning": Algorithm("inf", "pooled", "none"),
  "no_adaptation": Algorithm("inf", "pooled", "none"),
}
