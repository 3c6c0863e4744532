"""Findings on preferences: labels, lengths of answers, contradictions and repeated prompts."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxft.data.documents import answer_hashes, prompt_hashes
from jaxft.data.rows import TokenRows
from jaxft.data.units import CHOSEN, NOUNS, REJECTED, SIDES
from jaxft.formatting import counted


@dataclass(frozen=True, slots=True)
class UnitFindings:
    """Findings about the preferences of a set, made before they are trained on.

    Attributes:
      counts: Number of chosen or desirable answers, and of rejected or undesirable ones.
      lengths: Mean trained tokens of either; 0 where there are none.
      contradictions: Pairs of which another one has the same prompt and the same answers the other
        way round; or labelled answers that have the other label too.
      prompts: Hash of the tokens of each unit's prompt, uint64 `[units]`.
    """

    counts: tuple[int, int]
    lengths: tuple[float, float]
    contradictions: int
    prompts: np.ndarray


def find_units(rows: TokenRows) -> UnitFindings:
    """Returns the findings on the preferences of a set."""
    documents, numbers = rows.documents, np.asarray(rows.numbers)
    assert documents.labels is not None
    labels = np.asarray(documents.labels)[numbers]
    sides = [numbers[labels == side] for side in (CHOSEN, REJECTED)]
    lengths = [documents.index["trained"][side] for side in sides]
    first, second = numbers[::2], numbers[1::2]
    prompts = prompt_hashes(documents, first)
    answers = answer_hashes(documents, first)
    if documents.units == "pairs":
        others = answer_hashes(documents, second)
        one = list(zip(prompts.tolist(), answers.tolist(), others.tolist(), strict=True))
        opposite = [(prompt, b, a) for prompt, a, b in one]
    else:
        marks = labels[::2]
        one = list(zip(prompts.tolist(), answers.tolist(), marks.tolist(), strict=True))
        opposite = [(prompt, answer, -mark) for prompt, answer, mark in one]
    there = set(one)
    return UnitFindings(
        counts=(len(sides[0]), len(sides[1])),
        lengths=(_mean(lengths[0]), _mean(lengths[1])),
        contradictions=sum(key in there for key in opposite),
        prompts=prompts,
    )


def count_known_prompts(found: UnitFindings, train: UnitFindings) -> int:
    """Returns how many units of a set have a prompt that is trained on."""
    return int(np.isin(found.prompts, train.prompts).sum())


def describe_doubts(rows: TokenRows, found: UnitFindings) -> Iterator[str]:
    """Yields a sentence for each thing that speaks against the labels of a set."""
    units, statistics = rows.documents.units, rows.statistics.read
    if found.contradictions:
        how = (
            "contradict another: the same prompt with the two answers the other way round"
            if units == "pairs"
            else "are labelled both ways"
        )
        yield (
            f"{found.contradictions:,} of {counted(len(found.prompts), NOUNS[units])} {how}. "
            "Remove them, or decide which is right."
        )
    if units == "labelled" and not all(found.counts):
        there, missing = SIDES[units] if found.counts[0] else SIDES[units][::-1]
        yield (
            f"all answers are {there}, none is {missing}, but the objective learns from the "
            "difference. Add rows with the other label."
        )
    if statistics.unordered_scores:
        yield (
            f"'score_chosen' is not above 'score_rejected' in {statistics.unordered_scores:,} of "
            f"{counted(statistics.scores, 'row')} that have both. Remove these rows, or check "
            "which answer is better."
        )


def describe_known_prompts(count: int, rows: TokenRows, name: str) -> str:
    """Says that prompts of a held-out set are trained on."""
    of = counted(rows.statistics.documents, NOUNS[rows.documents.units])
    return (
        f"the prompts of {count:,} of {of} are in the training data too: figures on {name} are "
        "then better than on new prompts"
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
