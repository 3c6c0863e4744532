"""Evaluation of a model, a checkpoint or an export, on named held-out data, on any mesh."""

import copy
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import data, distributed, progress
from jaxft.checkpoint import Checkpoints
from jaxft.config import RunConfig, to_dict
from jaxft.data import TokenRows, chat
from jaxft.errors import ConfigError, DataError
from jaxft.intervals import Estimate, paired_difference, proportion, ratio
from jaxft.model import (
    Model,
    Source,
    find_source,
    load_weights,
    read_description,
)
from jaxft.models.attention import check_backend
from jaxft.models.module import Params
from jaxft.program import (
    Evaluator,
    build_evaluator,
    make_placement,
    put,
    use_compilation_cache,
)

# Answers are generated in batches of this many prompts of similar length.
_ANSWER_BATCH = 64
# Tokens of a text that a sample in the report continues.
_TEXT_PROMPT = 32


@dataclass(frozen=True)
class RowSums:
    """What the eval step returned for each row, `[rows]` float64, and the means made of it."""

    total: np.ndarray
    weight: np.ndarray
    correct: np.ndarray

    @functools.cached_property
    def loss(self) -> Estimate:
        """Nats per trained token; the interval is over rows."""
        return ratio(self.total, self.weight)

    @functools.cached_property
    def perplexity(self) -> Estimate:
        """Exponential of the loss and of its interval."""
        loss = self.loss
        value, low, high = (math.exp(min(x, 700.0)) for x in (loss.value, loss.low, loss.high))
        return Estimate(value, low, high, loss.count)

    @functools.cached_property
    def token_accuracy(self) -> Estimate:
        """Share of trained tokens that were the model's first choice; the interval is over rows."""
        return ratio(self.correct, self.weight)

    def record(self) -> dict[str, Any]:
        """Returns what eval.jsonl holds of it."""
        record: dict[str, Any] = {"weight": float(self.weight.sum())}
        for name in ("loss", "perplexity", "token_accuracy"):
            estimate: Estimate = getattr(self, name)
            record |= {
                name: estimate.value,
                f"{name}_low": estimate.low,
                f"{name}_high": estimate.high,
            }
        return record


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
    """

    metric: str
    prompts: list[str]
    outputs: list[str]
    references: list[str]
    right: np.ndarray
    labels: int

    @property
    def accuracy(self) -> Estimate:
        """Share of right answers, with Wilson's interval."""
        return proportion(int(self.right.sum()), len(self.right))


@dataclass(frozen=True)
class Evaluation:
    """Result on one data set.

    Attributes:
      rows: Sums from which loss, perplexity and token accuracy are made.
      answers: Generated answers, if `eval.answers` asks for them and the data has them.
    """

    rows: RowSums
    answers: Answers | None

    def record(self) -> dict[str, Any]:
        """Returns a JSON-able summary."""
        record = self.rows.record()
        if self.answers is not None:
            record[self.answers.metric] = dataclasses.asdict(self.answers.accuracy)
            if self.answers.labels:
                record["labels"] = self.answers.labels
        return record


def evaluate_rows(
    evaluator: Evaluator, params: Params, rows: TokenRows, *, batch_size: int, max_rows: int = 0
) -> RowSums:
    """Runs the eval step over rows; memory does not grow with their number.

    Args:
      evaluator: Step and placement.
      params: In the evaluator's shardings.
      rows: Held-out data.
      batch_size: Rows at a time; rounded up to what the mesh splits evenly. It does not change
        the result.
      max_rows: Only the first rows; 0 for all.
    """
    placement = evaluator.placement
    batch_size = placement.whole_rows(batch_size)
    places = placement.held_rows(batch_size)
    count = min(max_rows, len(rows)) if max_rows else len(rows)
    parts, waiting = [], None
    for batch in data.eval_batches(rows, batch_size=batch_size, max_rows=max_rows, places=places):
        terms = evaluator.eval_step(
            params, put(batch, placement.rows, places=places, rows=batch_size)
        )
        if waiting is not None:
            parts.append(jax.device_get(waiting))
        # Read one batch late, so that the device always has the next one.
        waiting = terms
    parts.append(jax.device_get(waiting))
    total, weight, correct = (
        np.concatenate([getattr(part, name) for part in parts])[:count].astype(np.float64)
        for name in ("total", "weight", "correct")
    )
    return RowSums(total, weight, correct)


def evaluate(
    config: RunConfig, checkpoint: str | Path = "", *, step: str = "best"
) -> dict[str, Evaluation]:
    """Evaluates a model on `data.validation`, `eval.datasets` and `eval.retention`.

    Args:
      config: Names the data and how it is read; it is not changed.
      checkpoint: Workdir, checkpoint, Hugging Face folder or id; empty: `model.path`.
      step: Which checkpoint of a workdir: `best`, `latest` or a number.

    Returns:
      Results by data set name.

    Raises:
      JaxftError: If model or data cannot be read.
    """
    config = copy.deepcopy(config)
    config.model.path = str(checkpoint or config.model.path)
    distributed.require_joined()
    if not distributed.is_first():
        progress.console.quiet = True
    distributed.check_same("config", {**to_dict(config), "step": step})
    config.validate()
    sources = named_sources(config)
    use_compilation_cache(config.train.compilation_cache)
    placement = make_placement(config)
    with progress.phase("Model and tokenizer"):
        revision = "" if checkpoint else config.model.revision
        source = find_source(config.model.path, revision=revision, step=step)
        architecture, tokenizer = read_description(source, config)
        _say_differences(config, source)
    with (
        progress.phase("Data"),
        distributed.first_host_first("data", data.cache_folder(config.data)),
    ):
        rows = {
            name: data.prepare(
                text,
                config.data,
                tokenizer,
                seed=config.train.seed,
                training=False,
                name=name,
                on_log=progress.log,
            )
            for name, text in sources.items()
        }
    distributed.check_same("data", {name: found.digest for name, found in rows.items()})
    evaluator = build_evaluator(
        config,
        architecture,
        max_segments=max(r.max_segments for r in rows.values()),
        placement=placement,
    )
    with progress.phase("Weights"):
        params = load_weights(source, architecture, evaluator.abstract, evaluator.shardings)
    check_backend(evaluator.attention.backend, architecture.config)
    model = Model(architecture, evaluator.abstract, params, tokenizer, source)
    return {
        name: _evaluate_one(config, evaluator, model, name, rows[name], sources[name])
        for name in sources
    }


def _say_differences(config: RunConfig, source: Source) -> None:
    """Logs where a checkpoint was trained on data read in another way than it is evaluated on."""
    if source.checkpoints is None:
        return
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    trained = checkpoints.restore_config(source.step)
    checkpoints.close()
    here = to_dict(config)
    for key in ("format", "columns", "template", "thinking", "train_on", "text_split"):
        name = f"data.{key}"
        if trained.get(name, here[name]) != here[name]:
            progress.log(
                f"{name} is {here[name]!r} here; the run was trained with {trained[name]!r}.",
                style="yellow",
            )


def named_sources(config: RunConfig) -> dict[str, str]:
    """Returns held-out sources by name.

    Raises:
      ConfigError: If there is none, or `eval.datasets` is not of the form 'name=source;…'.
    """
    sources = {"validation": config.data.validation} if config.data.validation else {}
    for part in filter(None, map(str.strip, config.eval.datasets.split(";"))):
        name, equals, source = part.partition("=")
        if not (name.strip() and equals and source.strip()) or name.strip() in sources:
            raise ConfigError(
                f"eval.datasets has {part!r}; expected 'name=source' with a new name, several "
                "separated by ';'."
            )
        sources[name.strip()] = source.strip()
    if config.eval.retention:
        sources["retention"] = config.eval.retention
    if not sources:
        raise ConfigError(
            "There is nothing to evaluate on: set data.validation, eval.datasets or eval.retention."
        )
    return sources


def _evaluate_one(
    config: RunConfig, evaluator: Evaluator, model: Model, name: str, rows: TokenRows, source: str
) -> Evaluation:
    with progress.phase(f"Evaluating {name}"):
        sums = evaluate_rows(
            evaluator,
            model.params,
            rows,
            batch_size=config.eval.batch_size or config.train.batch_size,
            max_rows=config.eval.max_rows,
        )
        wanted = config.eval.answers != "none" and name != "retention" and rows.is_chat
        answers = answer(config, model, source) if wanted else None
    return Evaluation(sums, answers)


def answer(config: RunConfig, model: Model, source: str) -> Answers:
    """Generates an answer to each row's last turn and compares it with the reference.

    With `eval.answers=label` an answer is right if it is the reference, letter case and
    surrounding punctuation aside; with `exact` white space at its ends alone is forgiven.

    Raises:
      DataError: If no row ends with an assistant turn.
    """
    rows = list(_prompts(config, model.tokenizer, source, maximum=config.eval.answer_rows))
    if not rows:
        raise DataError(f"{source} has no row that ends with an assistant turn to compare with.")
    room = model.architecture.config.max_length - config.eval.max_new_tokens
    order = sorted(
        (i for i, row in enumerate(rows) if len(row.ids) <= room), key=lambda i: len(rows[i].ids)
    )
    if len(order) < len(rows):
        progress.log(
            f"{len(rows) - len(order)} of {len(rows)} prompts leave no room for "
            f"{config.eval.max_new_tokens} new tokens in the model's context; they count as wrong.",
            style="yellow",
        )
    outputs = [""] * len(rows)
    for start in range(0, len(order), _ANSWER_BATCH):
        part = order[start : start + _ANSWER_BATCH]
        # A last batch of another size would be compiled anew; the first prompt fills it up.
        padded = part + [part[0]] * (min(_ANSWER_BATCH, len(order)) - len(part))
        texts = model.generate_from_ids(
            [rows[i].ids for i in padded], max_new_tokens=config.eval.max_new_tokens
        )
        for i, text in zip(part, texts, strict=False):
            outputs[i] = text
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
    )


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A question as the model sees it, as a person reads it, and the answer expected."""

    ids: list[int]
    text: str
    reference: str


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
        found = _prompts(config, tokenizer, source, maximum=0, training=training)
        return list(itertools.islice((p for p in found if len(p.ids) <= room), count))
    prompts = []
    for number in range(min(count, len(rows))):
        ids = rows[number].tokens[rows[number].segments == 1][: 2 * _TEXT_PROMPT].tolist()
        half = min(len(ids), _TEXT_PROMPT)
        text, rest = tokenizer.decode(ids[:half]), tokenizer.decode(ids[half:])
        prompts.append(SamplePrompt(ids[:half], text, rest))
    return prompts


def _prompts(
    config: RunConfig, tokenizer: Any, source: str, *, maximum: int, training: bool = False
) -> Iterator[SamplePrompt]:
    """Yields the first rows that end with an answer; `maximum` 0 yields all."""
    template = chat.resolve_template(tokenizer, config.data)
    found = data.conversations(source, config.data, training=training, on_log=lambda text: None)
    answered = (row for row in found if row.messages[-1]["role"] == "assistant")
    for row in itertools.islice(answered, maximum or None):
        *asked, expected = row.messages
        ids = chat.prompt_ids(
            tokenizer,
            asked,
            template=template,
            tools=row.tools,
            thinking=config.data.thinking,
        )
        yield SamplePrompt(ids, str(asked[-1]["content"]), str(expected["content"]))


def _label(text: str) -> str:
    return re.sub(r"^\W+|\W+$", "", text).casefold()


@dataclass(frozen=True)
class Comparison:
    """Two models on one data set.

    Attributes:
      a: Result of the first.
      b: Result of the second.
      loss: Loss of b minus loss of a, paired over rows.
      answers: Share of right answers of b minus that of a, paired over answers.
    """

    a: Evaluation
    b: Evaluation
    loss: Estimate
    answers: Estimate | None


def compare(a: dict[str, Evaluation], b: dict[str, Evaluation]) -> dict[str, Comparison]:
    """Pairs the results of two models on the same data.

    Raises:
      ConfigError: If the models tokenise the data differently, so that rows cannot be paired.
    """
    return {name: _compare_one(name, a[name], b[name]) for name in a}


def _compare_one(name: str, a: Evaluation, b: Evaluation) -> Comparison:
    if not np.array_equal(a.rows.weight, b.rows.weight):
        raise ConfigError(
            f"The models read {name!r} as different tokens, so their losses per token cannot be "
            "compared row by row. Compare models that share a tokenizer and chat template."
        )
    answers = None
    if a.answers is not None and b.answers is not None:
        ones = np.ones(len(a.answers.right))
        answers = paired_difference((a.answers.right, ones), (b.answers.right, ones))
    loss = paired_difference((a.rows.total, a.rows.weight), (b.rows.total, b.rows.weight))
    return Comparison(a, b, loss, answers)
