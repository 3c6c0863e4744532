"""SimPO: simple preference optimisation, without a reference model.

Meng et al. 2024, arXiv 2405.14734, equation 6. With r(y) = beta log p(y), averaged over the tokens
of the answer:

  loss = -log sigmoid(r(chosen) - r(rejected) - gamma)

The published recipes give gamma as `gamma_beta_ratio`, which is gamma / beta.
"""

from dataclasses import dataclass

import jax

from jaxft.config import key
from jaxft.training.objectives.preferences import PairLoss, Pairs, make_pair_objective


@dataclass(kw_only=True, slots=True)
class SimpoKeys:
    """Keys of `objective.simpo`."""

    beta: float = key(
        2.0,
        "Reward of an answer per nat of its tokens' average log-probability; 2 to 10 are usual.",
        minimum=1e-6,
    )
    gamma: float = key(
        1.0,
        "Margin of the rewards at which a pair is as likely right as wrong; usual are 0.3 to 0.8 "
        "times beta.",
        minimum=0,
    )


def pair_loss(pairs: Pairs, keys: SimpoKeys) -> PairLoss:
    """Returns loss and rewards of each pair."""
    chosen, rejected = (keys.beta * answers.mean() for answers in pairs)
    return PairLoss(-jax.nn.log_sigmoid(chosen - rejected - keys.gamma), chosen, rejected)


OBJECTIVE = make_pair_objective(SimpoKeys, pair_loss, reference=False)
