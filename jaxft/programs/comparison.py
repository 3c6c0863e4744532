"""Two models on the same held-out data: paired differences with intervals."""

import math
from dataclasses import dataclass

import numpy as np

from jaxft import console
from jaxft.errors import ConfigError
from jaxft.programs.answers import Answers
from jaxft.programs.evaluation import Evaluation
from jaxft.reporting.intervals import Estimate, paired_difference

Sums = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators of a figure, `[units]` each."""


@dataclass(frozen=True)
class Comparison:
    """Two models on one data set.

    Attributes:
      a: Result of the first.
      b: Result of the second.
      differences: Each figure of b minus that of a, by name: paired over rows, or over units of
        preferences. Where the two read the data as different tokens, only `bits_per_byte` is
        there, paired over documents.
      answers: Share of right answers of b minus that of a, paired over answers; None without, and
        if the two were asked different questions.
      documents: Number of documents that were paired in place of rows; 0 if rows were.
    """

    a: Evaluation
    b: Evaluation
    differences: dict[str, Estimate]
    answers: Estimate | None
    documents: int


def compare(a: dict[str, Evaluation], b: dict[str, Evaluation]) -> dict[str, Comparison]:
    """Pairs the results of two models on the same data.

    Raises:
      ConfigError: If the models read the data as different tokens, and rows hold several documents,
        so that neither can be paired. `evaluate_pair` gives results that can.
    """
    return {name: _compare_one(name, a[name], b[name]) for name in a}


def _compare_one(name: str, a: Evaluation, b: Evaluation) -> Comparison:
    documents = 0
    if a.sums.bytes is None:
        _check_same_reference(name, a, b)
        sums_a, sums_b = _paired_by_unit(name, a, b)
    elif a.held_out.digest == b.held_out.digest:
        sums_a, sums_b = (
            {"loss": (e.sums.total, e.sums.weight), "bits_per_byte": _bits_and_bytes(e)}
            for e in (a, b)
        )
    else:
        bits_a, bits_b, documents = _paired_by_document(name, a, b)
        sums_a, sums_b = {"bits_per_byte": bits_a}, {"bits_per_byte": bits_b}
    differences = {name: paired_difference(sums_a[name], sums_b[name]) for name in sums_a}
    return Comparison(a, b, differences, _paired_answers(name, a.answers, b.answers), documents)


def _check_same_reference(name: str, a: Evaluation, b: Evaluation) -> None:
    """Raises ConfigError for figures that compare with different models."""
    ones = (a.reference, b.reference)
    if None not in ones and len({found.weights for found in ones if found}) > 1:
        paths = " and ".join(found.path for found in ones if found)
        raise ConfigError(
            f"{name}: the two models are compared with different references, {paths}, so that "
            "their figures say nothing beside one another. Name one for both with "
            "--config.model.path=…."
        )


def _paired_by_unit(
    name: str, a: Evaluation, b: Evaluation
) -> tuple[dict[str, Sums], dict[str, Sums]]:
    """Returns the sums of every figure of both models, of the units that both have read.

    Raises:
      ConfigError: If they have none in common.
    """
    if a.held_out.digest == b.held_out.digest:
        return a.sums.by_name, b.sums.by_name
    if a.held_out.rows.unit_size == 1:
        raise ConfigError(
            f"The models read {name!r} as different tokens, and this objective's loss of rows of "
            "other tokens cannot be paired. Compare them with --config.objective.name=sft."
        )
    places = [{key: i for i, key in enumerate(_unit_keys(e))} for e in (a, b)]
    common = [key for key in places[0] if key in places[1]]
    if not common:
        raise ConfigError(f"The models have read no preference of {name!r} in common.")
    found = []
    for evaluation, place in zip((a, b), places, strict=True):
        chosen = np.array([place[key] for key in common])
        sums = evaluation.sums.by_name
        found.append({name: (x[chosen], y[chosen]) for name, (x, y) in sums.items()})
    return found[0], found[1]


def _unit_keys(evaluation: Evaluation) -> list[tuple[int, int, int]]:
    """Returns source and data row of each unit, which no tokenizer changes."""
    rows, numbers = evaluation.held_out.rows, evaluation.sums.numbers
    assert numbers is not None
    keys: dict[int, list[tuple[int, int, int]]] = {}
    for row in dict.fromkeys(numbers[:, 0].tolist()):
        keys[row] = rows.unit_keys(row)
    return [keys[row][unit] for row, unit in numbers.tolist()]


def _paired_answers(name: str, a: Answers | None, b: Answers | None) -> Estimate | None:
    """Returns the difference of two shares of right answers, if they are to the same questions."""
    if a is None or b is None:
        return None
    if a.prompts != b.prompts:
        console.log(
            f"{name}: the models were asked different questions, as rows that the chat template "
            "of one cannot write were left out for it alone. Their answers are not paired; for "
            "that, take these rows out of the data.",
            style="yellow",
        )
        return None
    ones = np.ones(len(a.right))
    return paired_difference((a.right, ones), (b.right, ones))


def _bits_and_bytes(evaluation: Evaluation) -> Sums:
    assert evaluation.sums.bytes is not None
    return evaluation.sums.total / math.log(2), evaluation.sums.bytes


def _paired_by_document(
    name: str, a: Evaluation, b: Evaluation
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], int]:
    """Returns bits and bytes `[documents]` of both models, of the documents that both have read.

    Raises:
      ConfigError: If a row holds several documents.
    """
    by_document = [_sums_of_documents(name, evaluation) for evaluation in (a, b)]
    common = [key for key in by_document[0] if key in by_document[1]]
    if not common:
        raise ConfigError(f"The models have read no document of {name!r} in common.")
    sums_a, sums_b = (np.array([sums[key] for key in common]).T for sums in by_document)
    return (sums_a[0], sums_a[1]), (sums_b[0], sums_b[1]), len(common)


def _sums_of_documents(name: str, evaluation: Evaluation) -> dict[tuple[int, int], np.ndarray]:
    """Returns bits and bytes, `[2]`, by number of the source and of the document's row in it."""
    held_out = evaluation.held_out
    rows, index = held_out.rows, held_out.rows.documents.index
    sums: dict[tuple[int, int], np.ndarray] = {}
    bits, sizes = _bits_and_bytes(evaluation)
    for number, values in zip(held_out.numbers, np.stack([bits, sizes], axis=1), strict=True):
        pieces = rows.pieces(number)
        document = index[rows.begun(pieces)[0]]
        if len(pieces) > 1 or pieces[0, 1] > document["start"] + document["length"]:
            raise ConfigError(
                f"The models read {name!r} as different tokens, and several documents share a row, "
                "so that their losses cannot be paired. Compare them with `jaxft eval --compare` "
                "or evaluation.evaluate_pair, or evaluate both with --config.data.packing=none."
            )
        key = (int(document["source"]), int(document["row"]))
        sums[key] = sums.get(key, 0.0) + values
    return sums
