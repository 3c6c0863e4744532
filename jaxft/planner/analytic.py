"""A run's memory and time in closed form: for GPUs that are not there, and for pruning a search.

Every figure here is an estimate. What one layer computes, keeps and exchanges follows from the
model's shape and from where the strategy puts its arrays; what compilers make of it does not.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import activations as names
from jaxft.config import RunConfig
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel
from jaxft.planner.kernels import efficiency, mean_visible_pairs
from jaxft.planner.network import Network
from jaxft.planner.timeline import DCN, ICI, TO_HOST, Rates
from jaxft.planner.topology import Topology
from jaxft.sharding.collectives import Collective
from jaxft.sharding.reduce import WeightPlan, plan_weight
from jaxft.sharding.rules import Placement, as_names
from jaxft.state import partition

# Share of the exchange of weights and gradients that runs beside the layers' work. The TPU compiler
# hides little of it unless told to; that of XLA for GPU is an assumption.
_HIDDEN = {"tpu": 0.0, "gpu": 0.7}
# Memory traffic of norms, activations, rotary embedding and residual adds, of each token, layer and
# pass: numbers read and written for each of the stream's width and of the hidden width.
_PASSED = (15.0, 2.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of one run, for one device and step.

    Attributes:
      kinds: Bytes of memory by kind, as `planner.memory.KINDS`.
      host: Bytes in the host's memory.
      seconds: Of a step.
      terms: Seconds of what is in it: `compute`, `attention`, `memory`, `ici`, `dcn`, `host`.
      flops: Of matrix products, with what rematerialisation repeats.
      exchanges: What is exchanged, as one collective each by kind and mesh axes, with its seconds
        and the share of them that is hidden.
    """

    kinds: dict[str, int]
    host: int
    seconds: float
    terms: dict[str, float]
    flops: float
    exchanges: tuple[tuple[Collective, float, float], ...]

    @property
    def bytes(self) -> int:
        """Of device memory."""
        return sum(self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Estimates runs of one model on one slice.

    Attributes:
      architecture: Of the model.
      topology: Where.
      rates: What share of published rates is reached.
      flash: Whether attention's scores are made a block at a time, and not of whole rows.
    """

    architecture: Architecture
    topology: Topology
    rates: Rates = field(default_factory=Rates)
    flash: bool = True

    def estimate(self, config: RunConfig, placed: "Placed") -> Estimate:
        """Returns memory and time of a run.

        Args:
          config: The run's.
          placed: The model where the run's strategy puts it.

        Raises:
          ConfigError: If the strategy cannot place the model.
        """
        return _Run(self, config, placed).estimate()


class Placed:
    """A model under a strategy on a mesh: what does not depend on how it is trained.

    Args:
      placement: The strategy on a mesh.
      abstract: The model.
      length: Positions of a row.
      freeze: As `optim.freeze`: what it matches has no gradient and no moments.
    """

    def __init__(
        self, placement: Placement, abstract: AbstractModel, length: int, freeze: str = ""
    ):
        self.placement, self.abstract, self.length = placement, abstract, length
        self.trainable, _ = partition(abstract.params, freeze)

    @functools.cached_property
    def parameters(self) -> int:
        """Bytes of parameters on a device."""
        return self._held(self.abstract.params)

    @functools.cached_property
    def gradients(self) -> int:
        """Bytes of gradients on a device, in the parameters' type."""
        return self._held(self.trainable, self.placement.gradient_rules)

    @functools.cached_property
    def moments(self) -> int:
        """Bytes of one of the optimizer's two moments on a device."""
        return self._held(self.trainable, self.placement.moment_rules)

    def _held(
        self, params: Mapping[str, jax.ShapeDtypeStruct], rules: Mapping[str, Any] | None = None
    ) -> int:
        shardings = self.placement.shardings(params, self.abstract.axes, rules=rules)
        return sum(
            math.prod(shardings[path].shard_shape(spec.shape)) * spec.dtype.itemsize
            for path, spec in params.items()
        )

    @functools.cached_property
    def weights(self) -> list[tuple[tuple[int, ...], WeightPlan]]:
        """Shape and plan of each weight of one layer."""
        layers = [
            (axes[1:], tuple(self.abstract.params[path].shape)[1:])
            for path, axes in self.abstract.axes.items()
            if axes[0] == "layers" and len(axes) >= 3
        ]
        return [(shape, self._plan(axes, shape)) for axes, shape in layers]

    @functools.cached_property
    def expansions(self) -> int:
        """How many products lead to the hidden width of the feed-forward part: two if gated."""
        wide = sum({"layers", "mlp", "embed"} <= set(axes) for axes in self.abstract.axes.values())
        return wide - 1  # one leads back

    @functools.cached_property
    def updated(self) -> dict[str, tuple[str, ...]]:
        """Mesh axes over which updated parameters are gathered, as moments are cut further."""
        values, moments = (
            self.placement.shardings(self.abstract.params, self.abstract.axes, rules=rules)
            for rules in (None, self.placement.moment_rules)
        )
        return {
            path: tuple(name for name in _names(moments[path]) if name not in _names(values[path]))
            for path in self.abstract.params
        }

    def bytes_of(self, path: str) -> int:
        """Returns the bytes of a parameter as a device holds it."""
        return self._held({path: self.abstract.params[path]})

    def head(self, vocab: int, embed: int) -> tuple[tuple[int, ...], WeightPlan]:
        """Returns shape and plan of the head."""
        return (vocab, embed), self._plan(("vocab", "embed"), (vocab, embed))

    def _plan(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> WeightPlan:
        # How many rows there are does not matter, only how they are split.
        with self.placement.activate():
            return plan_weight(axes, shape, (self.placement.batch_shards, self.length))


def _names(sharding: Any) -> tuple[str, ...]:
    return tuple(name for entry in sharding.spec for name in as_names(entry))


def _reduced(plan: WeightPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh axes over which a gradient is scattered, and those it is summed over else.

    Devices along an axis that cuts the product itself, as of experts, have gradients of their own.
    """
    scattered = tuple(name for group in plan.scattered for name in group)
    own = {*scattered, *(name for group in plan.held for name in group)}
    return scattered, tuple(n for group in plan.tokens for n in group if n not in own)


class _Run:
    """One run: sizes that several parts of the estimate need."""

    def __init__(self, estimator: Estimator, config: RunConfig, placed: Placed):
        self.config, self.placed, self.placement = config, placed, placed.placement
        placement = placed.placement
        self.model = estimator.architecture.config
        self.chip = estimator.topology.chip.core
        self.rates = estimator.rates
        self.network = Network(estimator.topology.chip, placement.mesh, estimator.topology.shape)
        numerics = make_numerics(config.model.dtypes)
        self.itemsize = jnp.dtype(numerics.compute_dtype).itemsize
        self.param_itemsize = jnp.dtype(numerics.param_dtype).itemsize
        self.passes = config.train.accumulation
        self.rows = config.train.batch_size // self.passes
        length = config.data.max_length
        # Tokens of one device in one micro-batch.
        self.tokens = (
            self.rows * length / self._split("batch", self.rows) / self._split("seq", length)
        )
        self.stages = max(1, self._split("layers", self.model.layers))
        self.layers = self.model.layers / self.stages
        self.turns = self.passes + (self.stages - 1 if self.stages > 1 else 0)
        chosen = self.model.experts.chosen if self.model.experts else 1
        # Numbers of each token at the hidden width of the feed-forward part.
        self.hidden = self.model.mlp * chosen / self._split("act_mlp", self.model.mlp)
        self.kept = names.kept(config.model.remat)
        self.offloaded = names.offloaded(config.model.remat, config.model.offload)
        self.is_tpu = estimator.topology.chip.is_tpu
        self.flash = estimator.flash

    def estimate(self) -> Estimate:
        kinds, host = self._memory()
        exchanges = self._exchanges()
        matmul, attention = self._flops()
        peak = self.chip.peak("float32" if self.config.model.dtypes == "float32" else "bfloat16")
        terms = {
            "compute": matmul / (peak * self.chip.product_share),
            "attention": attention / (peak * efficiency(self.chip, self.model.head_dim)),
            "memory": self._passed_bytes() / (self.chip.bandwidth * self.rates.memory),
            ICI: sum(s * (1 - h) for one, s, h in exchanges if not one.across_slices),
            DCN: sum(s * (1 - h) for one, s, h in exchanges if one.across_slices),
            TO_HOST: 2 * host * self.passes / self.chip.host if self.chip.host else 0.0,
        }
        busy = terms["compute"] + terms["attention"] + terms["memory"]
        # Stages wait for the first micro-batch to come and for the last to go.
        busy *= self.turns / self.passes
        seconds = max(busy + terms[ICI] + terms[DCN], terms[TO_HOST])
        return Estimate(
            kinds=kinds,
            host=host,
            seconds=seconds,
            terms=terms,
            flops=matmul + attention,
            exchanges=exchanges,
        )

    def _split(self, axis: str, size: int) -> int:
        """Returns how many parts a named dimension of a size is cut into."""
        return math.prod(self.placement.mesh.shape[name] for name in self._axes(axis, size))

    def _axes(self, axis: str, size: int) -> tuple[str, ...]:
        """Returns the mesh axes that cut a named dimension of a size."""
        [entry] = self.placement.spec((axis,), (size,), "an estimate")
        return as_names(entry)

    # Memory.

    def _memory(self) -> tuple[dict[str, int], int]:
        gradients = self.placed.gradients
        summed = 4 / self.param_itemsize if self.passes > 1 else 1.0
        kept, host = self._kept_bytes()
        head = self.model.vocab * self.model.embed / self._split("act_vocab", self.model.vocab)
        length = self.config.data.max_length
        chunk = min(self.config.objective.chunk or length, length)
        rows = self.rows / self._split("batch", self.rows)
        logits = (
            3 * 4 * chunk * rows * self.model.vocab / self._split("act_vocab", self.model.vocab)
        )
        in_flight = min(self.passes, 2 * self.stages - 1) if self.stages > 1 else 1
        kinds = {
            "parameters": self.placed.parameters,
            "optimizer": 2 * self.placed.moments,
            "batch": 20 * self.tokens * self.passes,
            "gradients": gradients * (summed + (1 if self.passes > 1 else 0)),
            "activations": kept * in_flight,
            "logits": logits + head * 4,
            "weights": 2 * self._layer_weights() + head * self.itemsize,
            "temporaries": self._layer_working_set(),
            "program": 50 << 20,
        }
        return {kind: round(size) for kind, size in kinds.items()}, round(host)

    def _widths(self) -> dict[str, float]:
        """Returns numbers that a device makes of each token in one layer, by activation."""
        m = self.model
        heads = m.heads / self._split("act_heads", m.heads)
        keys = m.kv_heads / self._split("act_kv_heads", m.kv_heads)
        stream = m.embed * self._split("seq", self.config.data.max_length)
        stream /= self._split("stream_seq", self.config.data.max_length)
        return {
            names.INPUTS: stream,
            names.QKV: (heads + 2 * keys) * m.head_dim,
            names.ATTENTION: heads * (m.head_dim + 4 / self.itemsize),
            names.ATTENTION_OUT: stream,
            names.MLP: self.placed.expansions * self.hidden,
            names.MLP_OUT: stream,
        }

    def _kept_bytes(self) -> tuple[float, float]:
        """Returns bytes that wait for the backward pass, on the device and on the host."""
        widths = self._widths()
        remat = self.config.model.remat
        kept = {names.INPUTS, *self.kept}
        if remat in ("dots", "none"):
            kept = set(widths) - ({names.ATTENTION} if remat == "dots" else set())
        # Without rematerialisation norms and activations stay as well.
        more = self.hidden + 4 * widths[names.INPUTS] if remat == "none" else 0.0
        of_token = self.tokens * self.layers * self.itemsize
        there = sum(widths[name] for name in self.offloaded)
        here = sum(widths[name] for name in kept - self.offloaded) + more
        return of_token * here, of_token * there

    def _layer_working_set(self) -> float:
        """Returns bytes that the backward pass of one layer has in hand."""
        widths = self._widths()
        at_once = widths[names.MLP] + self.hidden + 6 * widths[names.INPUTS] + 2 * widths[names.QKV]
        heads = self.model.heads / self._split("act_heads", self.model.heads)
        # Scores and their gradient, float32, and weights of values.
        scores = 0.0 if self.flash else heads * self.config.data.max_length * (8 + self.itemsize)
        return self.tokens * (self.itemsize * at_once + scores)

    def _layer_weights(self) -> float:
        """Returns bytes of one layer's weights as a device multiplies with them."""
        return sum(
            math.prod(shape) * self.itemsize / self._parts(plan.held)
            for shape, plan in self.placed.weights
        )

    # Work.

    def _flops(self) -> tuple[float, float]:
        """Returns FLOPs of weights and of attention on one device in a step."""
        m = self.model
        widths = self._widths()
        heads = m.heads / self._split("act_heads", m.heads)
        products = {
            names.QKV: m.embed * widths[names.QKV],
            names.ATTENTION_OUT: m.embed * heads * m.head_dim,
            names.MLP: m.embed * widths[names.MLP],
            names.MLP_OUT: m.embed * self.hidden,
        }
        remat = self.config.model.remat
        again: set[str] = set()
        if remat not in ("none", "dots"):
            # Nothing reads the last product of a layer once more.
            again = set(products) - self.kept - {names.MLP_OUT}
        forward = sum(products.values())
        layer = 3 * forward + sum(products[name] for name in again)
        of_layers = 2 * self.tokens * self.layers * layer
        # Forward, its logits once more, and two gradients.
        head = 2 * self.tokens * 4 * m.embed * m.vocab / self._split("act_vocab", m.vocab)
        length = self.config.data.max_length
        pairs = self.tokens / length * mean_visible_pairs(m, length)
        repeated = names.ATTENTION not in self.kept and remat != "none"
        attention = 2 * (2 + 5 + (2 if repeated else 0)) * pairs * heads * m.head_dim * self.layers
        return (of_layers + head) * self.passes, attention * self.passes

    def _passed_bytes(self) -> float:
        m = self.model
        widths = self._widths()
        passes = 2 + (self.config.model.remat not in ("none", "dots"))
        of_token = _PASSED[0] * widths[names.INPUTS] + _PASSED[1] * self.hidden
        layers = self.tokens * self.layers * passes * self.itemsize * of_token
        logits = 4 * 4 * self.tokens * m.vocab / self._split("act_vocab", m.vocab)
        state = 2 * self.placed.parameters + 4 * self.placed.moments
        sums = 3 * self.placed.gradients
        return (layers + logits + sums) * self.passes + state

    # Communication.

    def _parts(self, cut: tuple[tuple[str, ...], ...]) -> int:
        return math.prod(self.placement.mesh.shape[name] for group in cut for name in group)

    def _exchanges(self) -> tuple[tuple[Collective, float, float], ...]:
        """Returns what is exchanged by kind and axes, its seconds, and the share that is hidden."""
        mesh = self.placement.mesh
        of_weights: dict[tuple[str, tuple[str, ...]], float] = {}
        of_tokens: dict[tuple[str, tuple[str, ...]], float] = {}

        def add(
            table: dict[tuple[str, tuple[str, ...]], float],
            kind: str,
            axes: tuple[str, ...],
            payload: float,
        ) -> None:
            axes = tuple(a for a in mesh.axis_names if a in axes and mesh.shape[a] > 1)
            if axes and payload:
                table[kind, axes] = table.get((kind, axes), 0.0) + payload

        self._of_weights(functools.partial(add, of_weights))
        self._of_tokens(functools.partial(add, of_tokens))
        hidden = _HIDDEN["tpu" if self.is_tpu else "gpu"]
        return tuple(
            (one, self._seconds(one), share)
            for table, share in ((of_weights, hidden), (of_tokens, 0.0))
            for one in (self._collective(*key, payload) for key, payload in table.items())
        )

    def _seconds(self, one: Collective) -> float:
        summed = one.kind in ("all-reduce", "reduce-scatter")
        return self.network.seconds(one) / (self.rates.sums if summed else self.rates.links)

    def _of_weights(self, add: Callable[[str, tuple[str, ...], float], None]) -> None:
        """Adds what travels of weights and of their gradients."""
        uses = [(*weight, self.layers * self.turns, 2) for weight in self.placed.weights]
        # The head is gathered once: its backward pass finds it there.
        uses.append((*self.placed.head(self.model.vocab, self.model.embed), self.passes, 1))
        for shape, plan, times, gathers in uses:
            whole = math.prod(shape) * self.itemsize / self._parts(plan.held)
            gathered = tuple(name for group in plan.gathered for name in group)
            scattered, rest = _reduced(plan)
            add("all-gather", gathered, gathers * whole * times)
            add("reduce-scatter", scattered, whole * times)
            add("all-reduce", rest, whole / self._parts(plan.scattered) * times)
        # Rows of the embedding travel, and its gradient in the parameters' type.
        shape, plan = self.placed.head(self.model.vocab, self.model.embed)
        cut = self._parts(plan.held) * self._parts(plan.gathered)
        columns = tuple(name for group in plan.gathered for name in group)
        rest = tuple(name for name in _reduced(plan)[1] if name not in columns)
        add("all-reduce", rest, self.passes * math.prod(shape) * self.param_itemsize / cut)
        for path, extra in self.placed.updated.items():
            add("all-gather", extra, self.placed.bytes_of(path))

    def _of_tokens(self, add: Callable[[str, tuple[str, ...], float], None]) -> None:
        """Adds what travels of tokens: between parts of heads, of rows, of experts, of stages.

        The formulas are those of docs/sharding.md.
        """
        m, length = self.model, self.config.data.max_length
        stream = self.tokens * m.embed * self.itemsize
        keys = self.tokens * m.kv_heads * m.head_dim * self.itemsize
        times = self.layers * self.turns
        add("all-reduce", self._axes("act_mlp", m.mlp), 4 * times * stream)
        parts = self._split("seq", length)
        hops = 8 * parts - 4 if self.itemsize == 2 else 6 * parts - 4
        add("collective-permute", self._axes("seq", length), times * keys * hops)
        if m.experts:
            axes = self._axes("act_experts", m.experts.count)
            add("all-to-all", axes, 4 * m.experts.chosen * times * stream)
        stages = self._axes("layers", m.layers)
        add("collective-permute", stages, 2 * self.turns * stream)
        add("all-reduce", stages, 4 * self.passes * stream)

    def _collective(self, kind: str, axes: tuple[str, ...], payload: float) -> Collective:
        mesh = self.placement.mesh
        index = tuple(slice(None) if a in axes else 0 for a in mesh.axis_names)
        places = np.arange(mesh.size).reshape(mesh.devices.shape)[index].reshape(-1)
        slices = {getattr(mesh.devices.flat[i], "slice_index", 0) for i in places}
        group = tuple(int(place) for place in places)
        return Collective(
            kind=kind,
            axes=axes,
            group_size=len(group),
            count=1,
            arrays=(round(payload),),
            across_slices=len(slices) > 1,
            groups=tuple(zip(group, (*group[1:], group[0]), strict=True))
            if kind == "collective-permute"
            else (group,),
        )
