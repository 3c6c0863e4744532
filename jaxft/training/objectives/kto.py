"""KTO: Kahneman-Tversky optimisation, of single answers labelled desirable or undesirable.

Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8. With r(y) = log p(y) - log p_ref(y),
summed over the tokens of the answer:

  loss of a desirable answer    = desirable_weight   (1 - sigmoid(beta (r(y) - z)))
  loss of an undesirable answer = undesirable_weight (1 - sigmoid(beta (z - r(y))))
  z = max(0, mean of r(y'))

z estimates the KL divergence of the policy from the reference: y' is the answer to another prompt,
which each unit holds beside its own. The mean is over all of them in a step, however it is split
into micro-batches and devices, and no gradient passes through it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.config import key
from jaxft.data.batch import Batch
from jaxft.data.units import CHOSEN, MISMATCHED, REJECTED
from jaxft.training.objectives.contract import Objective, Policy, Terms
from jaxft.training.objectives.preferences import (
    above_zero,
    averaged,
    sum_answers,
)


@dataclass(kw_only=True, slots=True)
class KtoKeys:
    """Keys of `objective.kto`."""

    beta: float = key(
        0.1,
        "Reward of an answer per nat of its log-ratio to the reference model: the larger, the "
        "nearer the policy stays to it.",
        minimum=1e-6,
    )
    desirable_weight: float = key(
        1.0,
        "Weight of desirable answers. Advised: desirable_weight times their number is 1 to 1.33 "
        "times undesirable_weight times the number of undesirable ones.",
        minimum=0,
    )
    undesirable_weight: float = key(1.0, "Weight of undesirable answers.", minimum=0)


def rows(policy: Policy, batch: Batch, keys: KtoKeys) -> Terms:
    """Returns the sums of each answer that has a label.

    Figures are averages: `accuracy`, the share of answers on the side of the KL estimate that
    their label says, half of those on neither; `kl`, the estimate in nats; rewards (beta times
    log-ratio) and log-probabilities of desirable answers as `chosen_…`, of undesirable ones as
    `rejected_…`.
    """
    scores = policy.scores(batch)
    # The column repeats one number.
    kl = jnp.maximum(jnp.max(batch["kl"], axis=1, keepdims=True), 0.0)
    total = weight = right = jnp.zeros((), jnp.float32)
    figures = {}
    for label, name, factor in (
        (CHOSEN, "chosen", keys.desirable_weight),
        (REJECTED, "rejected", keys.undesirable_weight),
    ):
        answers = sum_answers(scores, batch, label=label, count=policy.max_units, reference=True)
        exists = answers.length > 0
        distance = label * (answers.score - kl)
        loss, count = averaged(factor * jax.nn.sigmoid(-keys.beta * distance), exists)
        total, weight = total + loss, weight + count
        right += averaged(above_zero(distance), exists)[0]
        figures[f"{name}_reward"] = averaged(keys.beta * answers.score, exists)
        figures[f"{name}_log_prob"] = averaged(answers.log_prob, exists)
    figures |= {"accuracy": (right, weight), "kl": (kl * weight, weight)}
    return Terms(total, weight, figures)


def loss(policy: Policy, batch: Batch, keys: KtoKeys) -> Terms:
    """Returns the sums of a batch."""
    return rows(policy, batch, keys).summed()


def whole(policy: Policy, batch: Batch, _: KtoKeys) -> dict[str, tuple[Array, Array]]:
    """Returns sum and number of the log-ratios of answers to other prompts."""
    scores = policy.scores(batch)
    others = sum_answers(scores, batch, label=MISMATCHED, count=policy.max_units, reference=True)
    return {"kl": (jnp.sum(others.score), jnp.sum(others.length > 0, dtype=jnp.float32))}


def expected_at_start(keys: KtoKeys) -> dict[str, float]:
    """Returns what holds while the policy is the reference."""
    expected = {"chosen_reward": 0.0, "rejected_reward": 0.0}
    if keys.desirable_weight == keys.undesirable_weight:
        expected["loss"] = keys.desirable_weight / 2
    return expected


OBJECTIVE = Objective(
    keys=KtoKeys,
    loss=loss,
    rows=rows,
    units="labelled",
    reference=True,
    whole=whole,
    start=expected_at_start,
)
