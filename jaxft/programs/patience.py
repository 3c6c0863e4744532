"""The best loss and score so far, and the time since they improved."""

import dataclasses

from jaxft import console
from jaxft.config import RunConfig
from jaxft.programs.held_out import HeldOut
from jaxft.workdir.checkpoint import Progress


def is_over(config: RunConfig, reached: Progress) -> bool:
    """Returns whether nothing has improved for as many evaluations as the config allows."""
    return bool(config.eval.patience) and reached.stale_evaluations >= config.eval.patience


def count_loss(counts: Progress, loss: float) -> Progress:
    """Returns the counts with one more validation loss."""
    return dataclasses.replace(counts, best_loss=_least(counts.best_loss, loss))


def count_score(counts: Progress, score: float, minimum_change: float) -> Progress:
    """Updates best score and patience; a score that is not a number never improves anything."""
    improved = score < counts.reference_score - minimum_change
    return dataclasses.replace(
        counts,
        best_score=_least(counts.best_score, score),
        reference_score=score if improved else counts.reference_score,
        stale_evaluations=0 if improved else counts.stale_evaluations + 1,
    )


def _least(best: float, value: float) -> float:
    return min(best, value) if value == value else best


def name_yardstick(config: RunConfig, held_out: dict[str, HeldOut]) -> str:
    """Names what evaluations are judged by; scores by other yardsticks are not comparable."""
    if "validation" not in held_out:
        return ""
    if config.eval.best == "loss":
        return f"loss {held_out['validation'].digest}"
    keys = ("answers", "answer_rows", "max_new_tokens")
    how = " ".join(f"{key}={getattr(config.eval, key)}" for key in keys)
    return f"answers {held_out['validation'].rows.digest[:12]} {how}"


def measured_by(yardstick: str, counts: Progress) -> Progress:
    """Returns the counts of a checkpoint; if its scores are of something else, without them."""
    if counts.yardstick == yardstick:
        return counts
    new = Progress(data={})
    names = ("best_loss", "best_score", "reference_score", "stale_evaluations")
    if any(getattr(counts, name) != getattr(new, name) for name in names):
        console.log(
            "The validation data, or what of it the best checkpoint goes by, is not what it was in "
            "the earlier part of the run: the best checkpoint and patience begin anew.",
            style="yellow",
        )
    changes = {name: getattr(new, name) for name in names}
    return dataclasses.replace(counts, yardstick=yardstick, **changes)
