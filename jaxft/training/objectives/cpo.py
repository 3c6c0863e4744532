"""CPO: contrastive preference optimisation, without a reference model.

Xu et al. 2024, arXiv 2401.08417, equations 3 to 5. With r(y) = beta log p(y), summed over the
tokens of the answer:

  loss = -log sigmoid(r(chosen) - r(rejected)) - alpha log p(chosen) / length(chosen)

The second term, cross entropy, is averaged over the tokens of each chosen answer. TRL averages it
over those of all answers of a batch, so that there long answers count more and a pair's gradient
depends on what it is batched with; for one pair, or equal lengths, both are the same.
"""

from dataclasses import dataclass

import jax

from jaxft.config import key
from jaxft.training.objectives.preferences import PairLoss, Pairs, make_pair_objective


@dataclass(kw_only=True, slots=True)
class CpoKeys:
    """Keys of `objective.cpo`."""

    beta: float = key(
        0.1,
        "Reward of an answer per nat of its log-probability; 0.1 to 0.5 are usual.",
        minimum=1e-6,
    )
    alpha: float = key(1.0, "Weight of the chosen answer's cross entropy; 0: none.", minimum=0)


def pair_loss(pairs: Pairs, keys: CpoKeys) -> PairLoss:
    """Returns loss and rewards of each pair, and the cross entropy `nll`."""
    chosen, rejected = (keys.beta * answers.score for answers in pairs)
    nll = -pairs.chosen.mean()
    loss = keys.alpha * nll - jax.nn.log_sigmoid(chosen - rejected)
    return PairLoss(loss, chosen, rejected, {"nll": nll})


OBJECTIVE = make_pair_objective(CpoKeys, pair_loss, reference=False)
