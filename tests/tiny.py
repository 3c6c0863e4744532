"""Tiny models with the oracle's weights, and batches of documents, that several tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import AdapterConfig, ObjectiveConfig, from_dict
from jaxft.data.batch import COLUMNS, STANDARD, Batch
from jaxft.hf.rules import expand
from jaxft.models.adapters import start_values
from jaxft.models.config import Numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.models.module import AbstractModel, Params, merge
from jaxft.training.adaptation import adapted
from jaxft.training.feeding import put
from jaxft.training.objectives.bound import Judged, bind
from jaxft.training.program import Program, build, build_evaluator, make_placement
from jaxft.training.state import TrainState, init_state
from tests.oracle.cases import CASES, llama_tensors, tensors_of


@dataclass(frozen=True)
class Tiny:
    """A model of the oracle with its weights."""

    architecture: Architecture
    abstract: AbstractModel
    params: Params

    def merge(self, params: Params | None = None) -> Any:
        """Returns the module, with its own weights or others."""
        return merge(self.abstract.graphdef, self.params if params is None else params)

    def to_theirs(self, params: Params) -> dict[str, np.ndarray]:
        """Returns `{Hugging Face name: array}` of parameters or gradients."""
        shapes = {path: value.shape for path, value in params.items()}
        arrays = {path: np.asarray(value) for path, value in params.items()}
        return {
            t.name: t.to_theirs([arrays[part.rule.ours][part.index] for part in t.parts])
            for t in expand(self.architecture.naming.rules, shapes)
        }


def load_tiny(case: str, numerics: Numerics | None = None, **changes: Any) -> Tiny:
    """Returns a case's model; `changes` replace fields of its config.json.

    Changes that alter shapes are for Llama's cases: of others only the stored shapes are known.
    """
    config = CASES[case] | changes
    architecture = architecture_from_hf(config)
    abstract = architecture.abstract(numerics or Numerics())
    theirs = llama_tensors(config) if config["model_type"] == "llama" else tensors_of(case)
    layers: dict[str, list[np.ndarray]] = {}
    shapes = {path: spec.shape for path, spec in abstract.params.items()}
    for t in expand(architecture.naming.rules, shapes):
        for part in t.parts:
            layers.setdefault(part.rule.ours, []).append(part.to_ours(theirs[t.name]))
    params = {
        path: jnp.asarray(np.reshape(np.stack(layers[path]), spec.shape), spec.dtype)
        for path, spec in abstract.params.items()
    }
    return Tiny(architecture, abstract, params)


def with_adapters(tiny: Tiny, *, added: Sequence[int] = (), **keys: Any) -> Tiny:
    """Returns a model with adapters that start as a run's do, but move the model at once."""
    architecture = adapted(tiny.architecture, AdapterConfig(**keys), added=added)
    abstract = architecture.abstract(Numerics())
    adaptation, plain = architecture.adaptation, tiny.abstract.graphdef
    leaves = start_values(plain, tiny.params, adaptation, abstract.params, seed=0)
    for path, value in leaves.items():
        if path.endswith("lora_b"):
            random = np.random.RandomState(len(path))
            leaves[path] = value + jnp.asarray(random.normal(size=value.shape) * 0.1, value.dtype)
    return Tiny(architecture, abstract, tiny.params | leaves)


@dataclass(frozen=True)
class Document:
    """A text: what follows each token, and whether that carries loss."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def make_documents(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[Document]:
    """Returns random documents of these lengths, with some targets of weight 0."""
    random = np.random.RandomState(seed)
    documents = []
    for length in lengths:
        text = random.randint(vocab, size=length + 1).astype(np.int32)
        weights = (random.rand(length) < 0.7).astype(np.float32)
        documents.append(Document(text[:-1], text[1:], weights))
    return documents


def pack(rows: Sequence[Sequence[Document]], length: int) -> Batch:
    """Returns rows `[B, T]` that hold these documents one after the other, then padding."""
    shape = (len(rows), length)
    batch = Batch(**{name: np.zeros(shape, COLUMNS[name]) for name in STANDARD})
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            part = (row, slice(start, start + len(document.tokens)))
            batch.tokens[part], batch.targets[part] = document.tokens, document.targets
            batch.weights[part] = document.weights
            batch.positions[part] = np.arange(len(document.tokens))
            batch.segments[part] = number
            start += len(document.tokens)
    return batch


def random_rows(rows: int, length: int, vocab: int, *, seed: int = 0) -> Batch:
    """Returns packed rows of random documents, some rows with padding."""
    random = np.random.RandomState(seed)
    packed = []
    for row in range(rows):
        lengths = random.randint(1, length // 2, size=3)
        fitting = lengths[np.cumsum(lengths) <= length]
        packed.append(make_documents(fitting, vocab, seed=1000 * seed + row))
    return pack(packed, length)


def make_program(tiny: Tiny, devices: int = 1, *, max_units: int = 1, **changes: Any) -> Program:
    """Returns the program of a run in float32; `changes` are dotted keys with '__' for the dot."""
    values = {
        "model.dtypes": "float32",
        "model.remat": "none",
        "strategy": "ddp",
        "data.max_length": 24,
        "optim.learning_rate": 1e-3,
        "optim.schedule": "constant",
        "train.batch_size": 8,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    config = from_dict(values)
    placement = make_placement(config, jax.devices()[:devices])
    evaluator = build_evaluator(
        config, tiny.architecture, max_segments=8, max_units=max_units, placement=placement
    )
    return build(config, evaluator, steps=20)


def start(program: Program, params: Params, freeze: str = "") -> TrainState:
    """Returns the first state, on the program's devices; `params` are copied."""
    adaptation = program.evaluator.architecture.adaptation
    state = init_state(jax.tree.map(jnp.copy, params), program.optimizer, freeze, adaptation)
    return jax.tree.map(lambda x, spec: jax.device_put(x, spec.sharding), state, program.state)


def feed(program: Program, rows: Batch) -> Batch:
    """Returns rows `[B, T]` as the micro-batches of a step, on the program's devices."""
    count = program.batch.tokens.shape[0]
    return put(rows.map(lambda x: x.reshape(count, -1, x.shape[-1])), program.batch.tokens.sharding)


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference of two trees, relative to the largest value of each leaf."""
    errors = [
        float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))
        / max(float(np.max(np.abs(np.asarray(b, np.float64)))), 1e-30)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    return max(errors)


def judge(model: Any, batch: Batch, *, chunk: int = 0) -> Judged:
    """Returns the sums of supervised fine-tuning on a batch."""
    return bind(ObjectiveConfig(chunk=chunk)).judge(model, batch)
