"""Evaluation of a model, a checkpoint or an export, on named held-out data, on any mesh."""

import copy
import dataclasses
import functools
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import console, data, distributed
from jaxft.config import RunConfig, data_sets, held_out_share, to_dict
from jaxft.data import TokenRows, chat
from jaxft.data.problems import RowError
from jaxft.data.template import resolve_template
from jaxft.errors import ConfigError, DataError
from jaxft.models.attention import check_backend
from jaxft.models.families import Architecture
from jaxft.models.module import Params
from jaxft.programs import capacity
from jaxft.programs.model import Model, load_weights, read_description
from jaxft.reporting.intervals import Estimate, paired_difference, proportion, ratio
from jaxft.sharding.rules import Placement
from jaxft.training.program import (
    Evaluator,
    build_evaluator,
    make_placement,
    put,
    use_compilation_cache,
)
from jaxft.workdir.checkpoint import Checkpoints
from jaxft.workdir.source import Source, find_source, is_run

# Answers are generated in batches of this many prompts of similar length.
_ANSWER_BATCH = 64
# Keys on which it depends which rows a part of the training data holds out: they say which rows
# there are, and what the content is by which they are chosen.
_DECIDE_WHAT_IS_HELD_OUT = (
    "data.validation",
    "data.train",
    "data.format",
    "data.columns",
    "data.text_split",
    "data.bad_rows",
    "data.control_tokens",
    "train.seed",
)
_DECIDE_HOW_ROWS_ARE_READ = (
    "format",
    "columns",
    "text_split",
    "template",
    "thinking",
    "control_tokens",
    "train_on",
)
# Tokens of a text that a sample in the report continues.
_TEXT_PROMPT = 32


@dataclass(frozen=True)
class HeldOut:
    """The rows of a data set that are evaluated: all of them, or a sample.

    Attributes:
      rows: All rows.
      numbers: Those that are evaluated, in order.
      bytes: Length of the trained text of each, int64 `[numbers]`.
    """

    rows: TokenRows
    numbers: Sequence[int]
    bytes: np.ndarray

    @functools.cached_property
    def documents(self) -> int:
        """Documents that stand in these rows."""
        return self.rows.count_documents(self.numbers)

    @property
    def digest(self) -> str:
        """Hash of all that is evaluated: figures with other digests are of other data."""
        return f"{self.rows.digest[:12]}-{len(self.numbers)}"

    @property
    def is_sample(self) -> bool:
        """Whether there are more rows."""
        return len(self.numbers) < len(self.rows)

    def record(self) -> dict[str, Any]:
        """Returns what eval.jsonl holds of it."""
        return {
            "rows": len(self.numbers),
            "of_rows": len(self.rows),
            "documents": self.documents,
            "digest": self.digest,
        }


def take_rows(rows: TokenRows, tokenizer: Any, *, maximum: int, seed: int) -> HeldOut:
    """Returns the rows to evaluate.

    Args:
      rows: Held-out data.
      tokenizer: The one that made them.
      maximum: Size of a sample; 0 takes all rows.
      seed: Of the sample.
    """
    numbers = data.sample_numbers(len(rows), maximum, seed=seed)
    return HeldOut(rows, numbers, data.count_bytes(rows, tokenizer, numbers))


@dataclass(frozen=True)
class RowSums:
    """What the eval step returned for each row, `[rows]` float64, and the means made of it.

    Attributes:
      total: Nats of all trained tokens.
      weight: Number of trained tokens.
      correct: Those of them that were the model's first choice.
      bytes: Length of their text.
    """

    total: np.ndarray
    weight: np.ndarray
    correct: np.ndarray
    bytes: np.ndarray

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

    @functools.cached_property
    def bits_per_byte(self) -> Estimate:
        """Bits for each byte of the trained text, whatever its tokens; the interval is over rows.

        Not a number where trained tokens stand for no text.
        """
        return ratio(self.total / math.log(2), self.bytes)

    def record(self) -> dict[str, Any]:
        """Returns what eval.jsonl holds of it."""
        record: dict[str, Any] = {"weight": float(self.weight.sum())}
        for name in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
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
        """Their accuracy in words, with its interval and of how many rows it is."""
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


@dataclass(frozen=True)
class Evaluation:
    """Result on one data set.

    Attributes:
      rows: Sums from which loss, perplexity and token accuracy are made.
      answers: Generated answers, if `eval.answers` asks for them and the data has them.
      model: What was evaluated.
      held_out: What it was evaluated on.
    """

    rows: RowSums
    answers: Answers | None
    model: Source
    held_out: HeldOut

    def record(self) -> dict[str, Any]:
        """Returns a JSON-able summary."""
        return (
            self.rows.record()
            | self.held_out.record()
            | (self.answers.record() if self.answers is not None else {})
        )


def evaluate_rows(
    evaluator: Evaluator, params: Params, held_out: HeldOut, *, batch_size: int
) -> RowSums:
    """Runs the eval step over rows; memory does not grow with their number.

    Args:
      evaluator: Step and placement.
      params: In the evaluator's shardings.
      held_out: The rows.
      batch_size: Rows at a time; rounded up to what the mesh splits evenly. It does not change
        the result.
    """
    placement = evaluator.placement
    batch_size = placement.whole_rows(batch_size)
    places = placement.held_rows(batch_size)
    count = len(held_out.numbers)
    parts, waiting = [], None
    for batch in data.eval_batches(
        held_out.rows, batch_size=batch_size, numbers=held_out.numbers, places=places
    ):
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
    return RowSums(total, weight, correct, held_out.bytes.astype(np.float64))


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
    return _evaluate(_prepare(config, checkpoint, step))


def evaluate_pair(
    config: RunConfig, a: str | Path, b: str | Path, *, step: str = "best"
) -> tuple[dict[str, Evaluation], dict[str, Evaluation]]:
    """Evaluates two models so that `compare` can pair their results.

    Models that read the data as different tokens are given one document a row: then documents are
    paired, and compared by bits per byte.

    Args:
      config: As for `evaluate`.
      a: The first model, as `checkpoint` there.
      b: The second one.
      step: As for `evaluate`; of whichever of the two is a workdir.
    """
    has_steps = {path: is_run(path) for path in (a, b)}
    steps = [step if has_steps[path] or not any(has_steps.values()) else "best" for path in (a, b)]
    tasks = [_prepare(config, path, step) for path, step in zip((a, b), steps, strict=True)]
    digests = [[rows.digest for rows in task.rows.values()] for task in tasks]
    if digests[0] != digests[1]:
        console.log(
            "The two models read the data as different tokens, so that a loss per token of one "
            "says nothing beside that of the other. They are compared by bits per byte of the "
            "trained text, paired by document; for that each document gets a row of its own.",
            style="yellow",
        )
        tasks = [_with_a_row_for_each_document(task) for task in tasks]
    first, second = map(_evaluate, tasks)
    return first, second


@dataclass(frozen=True)
class _Task:
    """An evaluation of which all but the weights has been read.

    Attributes:
      config: Of this evaluation, with `model.path` of its model.
      source: Where the model is.
      architecture: Its shape.
      tokenizer: Its tokenizer.
      new_tokens: Ids of tokens that the config adds to it, of those with a row of padding.
      placement: Strategy and mesh.
      sources: Held-out data by name.
      rows: The same as rows.
      prompts: Those that answers are generated for, of the sets that have them.
    """

    config: RunConfig
    source: Source
    architecture: Architecture
    tokenizer: Any
    new_tokens: tuple[int, ...]
    placement: Placement
    sources: dict[str, str]
    rows: dict[str, TokenRows]
    prompts: "dict[str, Prompts]"


def _prepare(config: RunConfig, checkpoint: str | Path, step: str) -> _Task:
    config = copy.deepcopy(config)
    config.model.path = str(checkpoint or config.model.path)
    distributed.require_joined()
    if not distributed.is_first():
        console.stderr.quiet = True
    distributed.check_same("config", {**to_dict(config), "step": step})
    config.validate()
    sources = named_sources(config)
    use_compilation_cache(config.train.compilation_cache)
    placement = make_placement(config)
    with console.phase("Model and tokenizer") as phase:
        revision = "" if checkpoint else config.model.revision
        source = find_source(config.model.path, revision=revision, step=step)
        phase.detail(source.name)
        description = read_description(source, config)
        architecture, tokenizer = description.architecture, description.tokenizer
        _say_differences(config, source)
    capacity.check(capacity.EVALUATION, config, architecture)
    with console.phase("Data"):
        rows = _read_rows(config, tokenizer, sources)
        prompts = {
            name: read_prompts(config, tokenizer, sources[name], rows[name], name=name)
            for name in rows
            if has_answers(config, name, rows[name])
        }
    return _Task(
        config,
        source,
        architecture,
        tokenizer,
        description.new_tokens,
        placement,
        sources,
        rows,
        prompts,
    )


def _read_rows(
    config: RunConfig, tokenizer: Any, sources: Mapping[str, str]
) -> dict[str, TokenRows]:
    with distributed.first_host_first("data", data.cache_folder(config.data)):
        rows = {
            name: data.prepare(
                text,
                config.data,
                tokenizer,
                seed=config.train.seed,
                training=False,
                name=name,
                on_log=console.log,
            )
            for name, text in sources.items()
        }
    distributed.check_same("data", {name: found.digest for name, found in rows.items()})
    return rows


def _with_a_row_for_each_document(task: _Task) -> _Task:
    config = copy.deepcopy(task.config)
    if config.data.packing == "stream":
        config.data.overlength = "split"  # a stream has no documents that are too long
    config.data.packing = "none"
    longest = max(rows.statistics.packed.longest for rows in task.rows.values())
    # No more padding than is needed; kernels of attention take multiples of this.
    config.data.max_length = min(config.data.max_length, -(-longest // 128) * 128)
    with console.phase("Data, one document a row"):
        rows = _read_rows(config, task.tokenizer, task.sources)
    return dataclasses.replace(task, config=config, rows=rows)


def _evaluate(task: _Task) -> dict[str, Evaluation]:
    with capacity.explained(capacity.EVALUATION, task.config):
        return _evaluate_all(task)


def _evaluate_all(task: _Task) -> dict[str, Evaluation]:
    config = task.config
    evaluator = build_evaluator(
        config,
        task.architecture,
        max_segments=max(r.max_segments for r in task.rows.values()),
        placement=task.placement,
    )
    with console.phase("Weights"):
        params = load_weights(
            task.source,
            task.architecture,
            evaluator.abstract,
            evaluator.shardings,
            tokenizer=task.tokenizer,
            new_tokens=task.new_tokens,
        )
    check_backend(evaluator.attention.backend, task.architecture.config)
    model = Model(task.architecture, evaluator.abstract, params, task.tokenizer, task.source)
    return {name: _evaluate_one(task, evaluator, model, name) for name in task.rows}


def _say_differences(config: RunConfig, source: Source) -> None:
    """Logs where a checkpoint was trained on data read in another way than it is evaluated on.

    Raises:
      ConfigError: If what is held out here is not what was held out in training.
    """
    if source.checkpoints is None:
        return
    checkpoints = Checkpoints(source.checkpoints, read_only=True)
    trained = checkpoints.restore_config(source.step)
    checkpoints.close()
    here = to_dict(config)
    _check_held_out(here, trained)
    for key in _DECIDE_HOW_ROWS_ARE_READ:
        name = f"data.{key}"
        if trained.get(name, here[name]) != here[name]:
            console.log(
                f"{name} is {here[name]!r} here; the run was trained with {trained[name]!r}.",
                style="yellow",
            )


def _check_held_out(here: dict[str, Any], trained: dict[str, Any]) -> None:
    """Refuses a part of the training data that a run was, by other keys, trained on."""
    if not held_out_share(here["data.validation"]):
        return
    changed = [
        f"--config.{key}={trained[key]}"
        for key in _DECIDE_WHAT_IS_HELD_OUT
        if trained.get(key, here[key]) != here[key]
    ]
    if changed:
        raise ConfigError(
            f"The part {here['data.validation']} was held out of training only with the keys of "
            f"the run. Evaluate it with {' '.join(changed)}, or on a file of its own."
        )


def named_sources(config: RunConfig) -> dict[str, str]:
    """Returns held-out sources by name.

    Raises:
      ConfigError: If there is none, or `eval.datasets` cannot be understood.
    """
    sources = {"validation": config.data.validation} if config.data.validation else {}
    sources |= data_sets(config.eval.datasets)
    if config.eval.retention:
        sources["retention"] = config.eval.retention
    if not sources:
        raise ConfigError(
            "There is nothing to evaluate on: set --config.data.validation, "
            "--config.eval.datasets or --config.eval.retention."
        )
    return sources


def _evaluate_one(task: _Task, evaluator: Evaluator, model: Model, name: str) -> Evaluation:
    config, prompts = task.config, task.prompts.get(name)
    with console.phase(f"Evaluating {name}"):
        held_out = take_rows(
            task.rows[name],
            task.tokenizer,
            maximum=config.eval.max_rows,
            seed=config.train.seed,
        )
        sums = evaluate_rows(
            evaluator,
            model.params,
            held_out,
            batch_size=config.eval.batch_size or config.train.batch_size,
        )
        answers = answer(config, model, prompts) if prompts is not None else None
    return Evaluation(sums, answers, task.source, held_out)


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A question as the model sees it, as a person reads it, and the answer expected.

    Attributes:
      ids: Token ids of the prompt.
      text: Its last message, or the text that is to be continued.
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
      of_rows: How many end with an answer.
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


@dataclass(frozen=True)
class Comparison:
    """Two models on one data set.

    Attributes:
      a: Result of the first.
      b: Result of the second.
      loss: Loss of b minus loss of a, paired over rows; None if they read other tokens.
      bits_per_byte: The same of bits per byte, over rows, or over documents if they read other
        tokens.
      answers: Share of right answers of b minus that of a, paired over answers; None without, and
        if the two were asked different questions.
      documents: Documents that were paired in place of rows; 0 if rows were.
    """

    a: Evaluation
    b: Evaluation
    loss: Estimate | None
    bits_per_byte: Estimate
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
    loss = None
    if a.held_out.digest == b.held_out.digest:
        loss = paired_difference((a.rows.total, a.rows.weight), (b.rows.total, b.rows.weight))
        sums_a, sums_b, documents = _bits_and_bytes(a), _bits_and_bytes(b), 0
    else:
        sums_a, sums_b, documents = _paired_by_document(name, a, b)
    bits = paired_difference(sums_a, sums_b)
    return Comparison(a, b, loss, bits, _paired_answers(name, a.answers, b.answers), documents)


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


def _bits_and_bytes(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    return evaluation.rows.total / math.log(2), evaluation.rows.bytes


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
