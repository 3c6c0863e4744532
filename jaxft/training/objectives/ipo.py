"""IPO: identity preference optimisation, whose margin has a goal instead of growing for ever.

Azar et al. 2023, arXiv 2310.12036, equation 17. With h(y) the log-ratio log p(y) - log p_ref(y),
averaged over the tokens of the answer:

  loss = (h(chosen) - h(rejected) - 1 / (2 beta))^2

The paper writes h without saying how length enters; its authors average over tokens, and so does
TRL. Rewards in figures are beta h too, where TRL reports sums over the answer.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxft.config import key
from jaxft.training.objectives.preferences import PairLoss, Pairs, make_pair_objective


@dataclass(kw_only=True, slots=True)
class IpoKeys:
    """Keys of `objective.ipo`."""

    beta: float = key(
        0.1,
        "Strength of the pull to the reference model, tau in the paper: the margin of the average "
        "log-ratio that is aimed at is 1 / (2 beta) nats.",
        minimum=1e-6,
    )


def pair_loss(pairs: Pairs, keys: IpoKeys) -> PairLoss:
    """Returns loss and rewards of each pair."""
    chosen, rejected = pairs.chosen.mean(), pairs.rejected.mean()
    loss = jnp.square(chosen - rejected - 1 / (2 * keys.beta))
    return PairLoss(loss, keys.beta * chosen, keys.beta * rejected)


def expected_at_start(keys: IpoKeys) -> dict[str, float]:
    """Returns what holds while the policy is the reference."""
    return {"loss": 1 / (4 * keys.beta**2), "margin": 0.0}


OBJECTIVE = make_pair_objective(IpoKeys, pair_loss, reference=True, start=expected_at_start)
