"""Generated answers to held-out questions, and whether they are right."""

import dataclasses
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft import console, data
from jaxft.config import RunConfig
from jaxft.data import TokenRows, chat
from jaxft.data.problems import RowError
from jaxft.data.template import resolve_template
from jaxft.errors import ConfigError, DataError
from jaxft.programs.model import Model
from jaxft.reporting.intervals import Estimate, proportion

# Answers are generated in batches of this many prompts of similar length.
_ANSWER_BATCH = 64
# Tokens of a text that a sample in the report continues.
_TEXT_PROMPT = 32


@dataclass(frozen=True)
class Answers:
    """Generated answers and whether each was right.

    Attributes:
      metric: `exact_match` or `label_accuracy`.
      prompts: Text of each prompt's last message.
      outputs: Generated texts.
      references: Texts expected.
      right: bool `[answers]`.
      labels: Number of distinct references, if answers are labels.
      of_rows: Rows that end with an answer; of more than were generated these are a sample.
    """

    metric: str
    prompts: list[str]
    outputs: list[str]
    references: list[str]
    right: np.ndarray
    labels: int
    of_rows: int

    @property
    def accuracy(self) -> Estimate:
        """Share of right answers, with Wilson's interval."""
        return proportion(int(self.right.sum()), len(self.right))

    @property
    def summary(self) -> str:
        """Accuracy in words, with its interval and the number of rows it is of."""
        accuracy = self.accuracy
        of = "" if accuracy.count == self.of_rows else f" of {self.of_rows:,}"
        return (
            f"{self.metric.replace('_', ' ')} {accuracy.value:.1%} [{accuracy.low:.1%}, "
            f"{accuracy.high:.1%}] over {accuracy.count:,}{of} rows"
        )

    def record(self) -> dict[str, Any]:
        """Returns what eval.jsonl holds of them."""
        record = {self.metric: dataclasses.asdict(self.accuracy) | {"of_rows": self.of_rows}}
        return record | ({"labels": self.labels} if self.labels else {})


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A question as the model sees it, as a person reads it, and the answer expected.

    Attributes:
      ids: Token ids of the prompt.
      text: Last message of the prompt, or the text that is to be continued.
      reference: The answer expected.
      tokens: Number of tokens that the answer takes, with reasoning and the one that ends it.
    """

    ids: list[int]
    text: str
    reference: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a data set that answers are generated for.

    Attributes:
      rows: All that end with an answer, or a sample of them, in order.
      of_rows: Number of rows that end with an answer.
    """

    rows: list[SamplePrompt]
    of_rows: int


def has_answers(config: RunConfig, name: str, rows: TokenRows) -> bool:
    """Whether `eval.answers` asks for answers to a data set: to all conversations but retention."""
    return config.eval.answers != "none" and name != "retention" and rows.is_chat


def read_prompts(
    config: RunConfig, tokenizer: Any, source: str, rows: TokenRows, *, name: str
) -> Prompts:
    """Returns prompts of `eval.answer_rows` of the rows: the same ones for every model and step.

    Only rows that are taken are tokenised and kept in memory.

    Raises:
      DataError: If no row ends with an assistant turn.
      ConfigError: If a label is longer than an answer may be.
    """
    chosen, count = _sample(
        _answered(config, source, rows), config.eval.answer_rows, seed=config.train.seed
    )
    if not count:
        raise DataError(f"{source} has no row that ends with an assistant turn to compare with.")
    prompts = list(_prompts(config, tokenizer, chosen))
    _check_lengths(config, tokenizer, prompts, name)
    return Prompts(prompts, count)


def _check_lengths(
    config: RunConfig, tokenizer: Any, rows: Sequence[SamplePrompt], name: str
) -> None:
    """Refuses labels, and logs references, that no answer of `eval.max_new_tokens` reaches."""
    limit = config.eval.max_new_tokens
    lengths: dict[str, int] = {}
    for row in rows:
        # The shortest way to say it: reasoning may be long or short, or absent.
        lengths[row.reference] = min(row.tokens, lengths.get(row.reference, row.tokens))
    references = list(lengths)
    longest = max(references, key=lengths.__getitem__)
    if lengths[longest] <= limit:
        return
    remedy = f"Set --config.eval.max_new_tokens={lengths[longest]}"
    if config.eval.answers == "label":
        count = sum(length > limit for length in lengths.values())
        raise ConfigError(
            f"eval.max_new_tokens is {limit}, but {count:,} of {len(references):,} labels of "
            f"{name} are longer, so that answers of that label can never be right. The longest, "
            f"{_shown(longest)}, has {lengths[longest]} tokens with the one that ends it. {remedy}."
        )
    count = sum(lengths[row.reference] > limit for row in rows)
    console.log(
        f"{name}: {count:,} of {len(rows):,} reference answers are longer than "
        f"eval.max_new_tokens {limit} and count as wrong, whatever the model knows. {remedy} to "
        "reach all of them.",
        style="yellow",
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def answer(config: RunConfig, model: Model, prompts: Prompts) -> Answers:
    """Generates an answer to each prompt and compares it with the reference.

    With `eval.answers=label` an answer is right if it is the reference, letter case and
    surrounding punctuation aside; with `exact` white space at its ends alone is forgiven. Reasoning
    is compared in neither; of tool calls the reference is the call as the template writes it.

    Where processes share the parameters, all of them call this with the same arguments.
    """
    rows = prompts.rows
    room = model.architecture.config.max_length - config.eval.max_new_tokens
    order = sorted(
        (i for i, row in enumerate(rows) if len(row.ids) <= room), key=lambda i: len(rows[i].ids)
    )
    if len(order) < len(rows):
        console.log(
            f"{len(rows) - len(order)} of {len(rows)} prompts leave no room for "
            f"{config.eval.max_new_tokens} new tokens in the model's context; they count as wrong.",
            style="yellow",
        )
    outputs = [""] * len(rows)
    for start in range(0, len(order), _ANSWER_BATCH):
        part = order[start : start + _ANSWER_BATCH]
        # A last batch of another size would be compiled anew; the first prompt fills it up.
        padded = part + [part[0]] * (min(_ANSWER_BATCH, len(order)) - len(part))
        generated = model.complete(
            [rows[i].ids for i in padded], max_new_tokens=config.eval.max_new_tokens
        )
        for i, ids in zip(part, generated, strict=False):
            outputs[i] = model.template.content_of(model.tokenizer.decode(ids))
    by_label = config.eval.answers == "label"
    normalise = _label if by_label else str.strip
    references = [row.reference for row in rows]
    answered = set(order)
    right = [
        i in answered and normalise(output) == normalise(reference)
        for i, (output, reference) in enumerate(zip(outputs, references, strict=True))
    ]
    return Answers(
        metric="label_accuracy" if by_label else "exact_match",
        prompts=[row.text for row in rows],
        outputs=outputs,
        references=references,
        right=np.array(right),
        labels=len(set(map(_label, references))) if by_label else 0,
        of_rows=prompts.of_rows,
    )


def read_sample_prompts(
    config: RunConfig, tokenizer: Any, rows: TokenRows, *, context: int
) -> list[SamplePrompt]:
    """Returns the first prompts of the validation data, or of the training data without any.

    Of plain text it is the first half of a document's first tokens that is to be continued.

    Args:
      config: Names the data, and how many samples there are.
      tokenizer: The tokenizer of the model.
      rows: That data, as rows.
      context: Tokens that the model can hold; prompts that leave no room are passed over.
    """
    count, room = config.eval.samples, context - config.eval.max_new_tokens
    if rows.is_chat and count:
        training = not config.data.validation
        source = config.data.train if training else config.data.validation
        found = _prompts(config, tokenizer, _answered(config, source, rows, training=training))
        return list(itertools.islice((p for p in found if len(p.ids) <= room), count))
    prompts = []
    for number in range(min(count, len(rows))):
        ids = rows[number].tokens[rows[number].segments == 1][: 2 * _TEXT_PROMPT].tolist()
        half = min(len(ids), _TEXT_PROMPT)
        text, rest = tokenizer.decode(ids[:half]), tokenizer.decode(ids[half:])
        prompts.append(SamplePrompt(ids[:half], text, rest, len(ids) - half))
    return prompts


def _answered(
    config: RunConfig, source: str, rows: TokenRows, *, training: bool = False
) -> Iterator[data.Conversation]:
    """Yields the conversations of a source that are in its rows and end with an answer."""
    found = data.conversations(
        source, config.data, rows=rows, training=training, on_log=lambda text: None
    )
    return (row for row in found if row.messages[-1]["role"] == "assistant")


def _sample[T](items: Iterable[T], size: int, *, seed: int) -> tuple[list[T], int]:
    """Returns a uniform sample of a stream, in its order, and how many items there were.

    Vitter's algorithm R (ACM TOMS 11, 1985): no more than the sample is in memory. Size 0 is all.
    """
    draw = random.Random(seed)
    kept: list[tuple[int, T]] = []
    count = 0
    for count, item in enumerate(items, start=1):
        if not size or len(kept) < size:
            kept.append((count, item))
        elif (place := draw.randrange(count)) < size:
            kept[place] = (count, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])], count


def _prompts(
    config: RunConfig, tokenizer: Any, rows: Iterable[data.Conversation]
) -> Iterator[SamplePrompt]:
    """Yields the prompt and the reference of rows that end with an answer."""
    template = resolve_template(tokenizer, config.data)
    for row in rows:
        try:
            asked = chat.question(tokenizer, row, template=template, thinking=config.data.thinking)
        except RowError as error:
            if config.data.bad_rows == "skip":
                continue
            raise DataError(f"{row.origin}: {error}") from error
        yield SamplePrompt(asked.ids, asked.text, asked.answer, asked.tokens)


def _label(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text).casefold()
