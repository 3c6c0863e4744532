"""ORPO: odds ratio preference optimisation, fine-tuning and preferences in one.

Hong et al. 2024, arXiv 2403.07691, equations 6 and 7. With l(y) = log p(y), averaged over the
tokens of the answer, and log odds(y) = l(y) - log(1 - exp l(y)):

  loss = -l(chosen) - weight log sigmoid(log odds(chosen) - log odds(rejected))

The first term, cross entropy, is over the answer alone and averaged for each pair. TRL averages it
over prompts and answers of a whole batch. Rewards in figures are weight l, as in TRL.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.config import key
from jaxft.training.objectives.preferences import PairLoss, Pairs, make_pair_objective


@dataclass(kw_only=True, slots=True)
class OrpoKeys:
    """Keys of `objective.orpo`."""

    weight: float = key(
        0.1,
        "Weight of the odds ratio beside the chosen answer's cross entropy: lambda in the paper, "
        "beta in TRL.",
        minimum=1e-6,
    )


def pair_loss(pairs: Pairs, keys: OrpoKeys) -> PairLoss:
    """Returns loss and rewards of each pair, the cross entropy `nll` and the `log_odds_ratio`."""
    chosen, rejected = pairs.chosen.mean(), pairs.rejected.mean()
    log_ratio = log_odds(chosen) - log_odds(rejected)
    loss = -chosen - keys.weight * jax.nn.log_sigmoid(log_ratio)
    figures = {"nll": -chosen, "log_odds_ratio": log_ratio}
    return PairLoss(loss, keys.weight * chosen, keys.weight * rejected, figures)


def log_odds(mean: Float[Array, "B U"]) -> Float[Array, "B U"]:
    """Returns log(p / (1 - p)) of an average log-probability log p; finite everywhere."""
    # A model may be so sure that float32 rounds log p to 0, where the odds are infinite. The value
    # is kept one rounding error below; the gradient, large there, is not cut off.
    bounded = jnp.minimum(mean, -jnp.finfo(jnp.float32).eps)
    mean += jax.lax.stop_gradient(bounded - mean)
    return mean - jax.nn.log1mexp(-mean)


OBJECTIVE = make_pair_objective(OrpoKeys, pair_loss, reference=False)
