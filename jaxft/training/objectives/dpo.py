"""DPO: direct preference optimisation, with its smoothed, robust and length-normalised forms.

Rafailov et al. 2023, arXiv 2305.18290. With r(y) = beta (log p(y) - log p_ref(y)), the sum being
over the tokens of the answer, and m = r(chosen) - r(rejected):

  loss = -log sigmoid(m)

- `label_smoothing` e, the conservative form (note of E. Mitchell, 2023, on noisy preferences): the
  labels are wrong with probability e.

  loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

- `robust` (Chowdhury et al. 2024, arXiv 2403.00409): an estimate of the loss under true labels
  that is unbiased if a share e of the labels is wrong.

  loss = (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e)

- `normalised` (dpo_norm of Tülu 3, Lambert et al. 2024, arXiv 2411.15124): r(y) is divided by the
  number of tokens of the answer, in figures as well (those of TRL stay sums).

The three can be combined.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from jaxft.config import key
from jaxft.training.objectives.preferences import PairLoss, Pairs, make_pair_objective


@dataclass(kw_only=True, slots=True)
class DpoKeys:
    """Keys of `objective.dpo`."""

    beta: float = key(
        0.1,
        "Reward of an answer per nat of its log-ratio to the reference model: the larger, the "
        "nearer the policy stays to it. With 'normalised', 2 to 10 are usual.",
        minimum=1e-6,
    )
    label_smoothing: float = key(
        0.0, "Share of pairs expected to be labelled the wrong way round.", minimum=0, maximum=0.5
    )
    robust: bool = key(
        False, "Correct for the wrong labels of label_smoothing, instead of being less certain."
    )
    normalised: bool = key(
        False, "Average an answer's log-ratio over its tokens, instead of summing it."
    )

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the keys together."""
        if self.robust and not 0 < self.label_smoothing < 0.5:
            yield (
                f"objective.dpo.robust needs the share of wrong labels, above 0 and below 0.5, but "
                f"objective.dpo.label_smoothing is {self.label_smoothing}; set "
                "--config.objective.dpo.label_smoothing=0.1 or the share you expect."
            )


def pair_loss(pairs: Pairs, keys: DpoKeys) -> PairLoss:
    """Returns loss and rewards of each pair."""
    chosen, rejected = (
        keys.beta * (answers.mean() if keys.normalised else answers.score) for answers in pairs
    )
    margin = chosen - rejected
    right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    flipped = keys.label_smoothing
    if keys.robust:
        loss = ((1 - flipped) * right - flipped * wrong) / (1 - 2 * flipped)
    else:
        loss = (1 - flipped) * right + flipped * wrong
    return PairLoss(loss, chosen, rejected)


def expected_at_start(_: DpoKeys) -> dict[str, float]:
    """Returns what holds while the policy is the reference, in every form."""
    return {"loss": math.log(2), "margin": 0.0}


OBJECTIVE = make_pair_objective(DpoKeys, pair_loss, reference=True, start=expected_at_start)
