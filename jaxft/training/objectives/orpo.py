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
from jaxft.training.objectives.preferences import Answers, PairLoss, Pairs, make_pair_objective


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
    log_ratio = log_odds(pairs.chosen) - log_odds(pairs.rejected)
    loss = -chosen - keys.weight * jax.nn.log_sigmoid(log_ratio)
    figures = {"nll": -chosen, "log_odds_ratio": log_ratio}
    return PairLoss(loss, keys.weight * chosen, keys.weight * rejected, figures)


def log_odds(answers: Answers) -> Float[Array, "B U"]:
    """Returns log(p / (1 - p)), p being the mean probability of a token; finite everywhere."""
    # A model may be so sure that float32 rounds the log-probability to 0, whose odds are infinite.
    # The value is kept one rounding error away, the gradient is not cut. A unit that is not there
    # is somewhere harmless.
    mean = jnp.where(answers.length > 0, answers.mean(), -1.0)
    bounded = jnp.minimum(mean, -jnp.finfo(jnp.float32).eps)
    mean += jax.lax.stop_gradient(bounded - mean)
    return mean - jax.nn.log1mexp(-mean)


OBJECTIVE = make_pair_objective(OrpoKeys, pair_loss, reference=False)
