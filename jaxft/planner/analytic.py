"""A run's memory and time in closed form: for GPUs that are not there, and for pruning a search.

Every figure here is an estimate. What one layer computes, keeps and exchanges follows from the
model's shape and from where the strategy puts its arrays; what compilers make of it does not.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxft.compiled.collectives import Collective
from jaxft.config import RunConfig
from jaxft.models import activations as names
from jaxft.models.families import Architecture
from jaxft.planner.placed import Placed
from jaxft.planner.products import Products, Work
from jaxft.planner.timeline import (
    ATTENTION,
    DCN,
    ICI,
    MATMUL,
    MEMORY,
    RECURRENCE,
    TO_HOST,
    WAIT,
    Rates,
)
from jaxft.planner.topology import Topology
from jaxft.sharding.reduce import WeightPlan
from jaxft.training.checks import check_matmul

# Most of the exchange of weights and gradients that runs beside the layers' work, as a share: with
# SparseCores 0.88 to 0.99 in compiled programs, on chips that sum gradients by copies 0.91
# (`fsdp` in benchmarks/results/*-tpu-steps.jsonl). Other TPUs make reduce-scatters on
# their core. Of GPUs it is an assumption.
_HIDDEN_BY_SPARSE_CORES, _HIDDEN_BY_COPIES, _HIDDEN_ON_GPU = 0.92, 0.91, 0.7
# Memory traffic of norms, activations, rotary embedding and residual adds, of each token, layer and
# pass: numbers read and written for each of the stream's width and of the hidden width.
_PASSED = (15.0, 2.5)


class Exchanged(NamedTuple):
    """All that is exchanged in one way in a step.

    Attributes:
      collective: Kind, mesh axes and bytes, as one collective.
      seconds: Time that links need for it.
      hidden: Share of these that runs beside other work.
      network: `ici` within a slice or an NVLink domain, `dcn` between them.
    """

    collective: Collective
    seconds: float
    hidden: float
    network: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Memory and time of one run, for one device and step.

    Attributes:
      kinds: Bytes of memory by kind, as `planner.memory.KINDS`.
      host: Bytes in the host's memory.
      terms: Seconds that each resource needs on its own, at its peak: `compute`, `memory`, `ici`,
        `dcn`, `host`.
      spent: Seconds that the device spends on what, and on waiting for what, at rates that are
        reached.
      flops: FLOPs of matrix products, with what rematerialisation repeats.
      exchanges: Exchanges by kind and mesh axes.
    """

    kinds: dict[str, int]
    host: int
    terms: dict[str, float]
    spent: dict[str, float]
    flops: float
    exchanges: tuple[Exchanged, ...]

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return sum(self.spent.values())

    @property
    def bytes(self) -> int:
        """Bytes of device memory."""
        return sum(self.kinds.values())


class Evaluation(NamedTuple):
    """Memory and time of the evaluation step, for one device.

    Attributes:
      bytes: Bytes of device memory.
      seconds: Time of a step.
    """

    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Estimates runs of one model on one slice.

    Attributes:
      architecture: The model.
      topology: The hardware.
      rates: Shares of published rates that are reached.
    """

    architecture: Architecture
    topology: Topology
    rates: Rates = field(default_factory=Rates)

    def estimate(self, config: RunConfig, placed: Placed) -> Estimate:
        """Returns memory and time of a run.

        Args:
          config: The run's.
          placed: The model where the run's strategy puts it.

        Raises:
          ConfigError: If the strategy cannot place the model there, or the chip has no products
            such as `model.matmul` asks for.
        """
        check_matmul(config, self.topology.chip)
        return self._run(config, placed).estimate()

    def memory(self, config: RunConfig, placed: Placed) -> dict[str, int]:
        """Returns bytes of a run by kind, also for a device of which no rates are published.

        Args:
          config: The run's.
          placed: The model where the run's strategy puts it.
        """
        return self._run(config, placed).memory()[0]

    def evaluation_memory(self, config: RunConfig, placed: Placed, rows: int) -> dict[str, int]:
        """Returns bytes of the evaluation step by kind, as `memory`.

        Args:
          config: The run's.
          placed: The model where the run's strategy puts it.
          rows: Of all devices.
        """
        return self._run(config, placed, evaluated=rows).evaluation_memory()

    def evaluation(self, config: RunConfig, placed: Placed, rows: int) -> Evaluation:
        """Returns memory and time of the evaluation step.

        Args:
          config: The run's.
          placed: The model where the run's strategy puts it.
          rows: Of all devices.
        """
        return self._run(config, placed, evaluated=rows).evaluation()

    def _run(self, config: RunConfig, placed: Placed, *, evaluated: int = 0) -> "_Run":
        return _Run(
            self.architecture, self.topology, self.rates, config, placed, evaluated=evaluated
        )


def _reduced(plan: WeightPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh axes over which a gradient is scattered, and those it is summed over else.

    Devices along an axis that cuts the product itself, as of experts, have gradients of their own.
    """
    scattered = tuple(name for group in plan.scattered for name in group)
    own = {*scattered, *(name for group in plan.held for name in group)}
    return scattered, tuple(n for group in plan.tokens for n in group if n not in own)


class _Run(Products):
    """One run: its footprint and products, and what computing and exchanging take."""

    def estimate(self) -> Estimate:
        """Returns memory and time of a training step."""
        kinds, host = self.memory()
        exchanges = self._exchanges()
        work = self._work()
        moved_by_layers, moved_else = self._passed_bytes()
        moved_by_rule = sum(self._rule_bytes())
        slow = {
            network: sum(e.seconds * (1 - e.hidden) for e in exchanges if e.network == network)
            for network in (ICI, DCN)
        }
        to_host = 2 * host * self.passes / self.chip.host if self.chip.host else 0.0
        reached = self._rates_of_products()
        moving = self.chip.bandwidth * self.rates.memory
        rounded = self.passes * work.rounded
        spent = {
            MATMUL: self.passes * (work.layers + work.head) / reached.products
            + rounded / reached.rounded,
            ATTENTION: self.passes * work.attention / reached.scores,
            RECURRENCE: self.passes * self._rule_seconds(work),
            MEMORY: (self.passes * moved_by_layers + moved_else) / moving,
            # Stages wait for the first micro-batch to come and for the last to go.
            f"{WAIT} stages": self._layer_seconds(work) * (self.turns - self.passes),
            **{f"{WAIT} {network}": seconds for network, seconds in slow.items()},
        }
        spent[MATMUL] += self._seconds_without_gradients()
        once = self.placed.orthogonalised() if self.config.optim.name == "muon" else 0.0
        spent[MATMUL] += once / reached.products
        # What travels to the host does so beside all else.
        spent[f"{WAIT} {TO_HOST}"] = max(0.0, to_host - sum(spent.values()))
        flops = self.passes * sum(work) + once
        return Estimate(
            kinds=kinds,
            host=host,
            terms={
                "compute": (flops - rounded) / reached.peak + rounded / reached.rounded_peak,
                "memory": (self.passes * (moved_by_layers + moved_by_rule) + moved_else)
                / self.chip.bandwidth,
                ICI: sum((e.seconds for e in exchanges if e.network == ICI), 0.0),
                DCN: sum((e.seconds for e in exchanges if e.network == DCN), 0.0),
                TO_HOST: to_host,
            },
            spent=spent,
            flops=flops,
            exchanges=exchanges,
        )

    def _seconds_without_gradients(self) -> float:
        """Returns seconds of the passes beside the one that learns, such as a reference's."""
        if not (passes := self.objective.forward_passes):
            return 0.0
        rows = self.config.train.batch_size
        forward = type(self)(*self.made_for, self.config, self.placed, evaluated=rows)
        forward.matmul = self.matmul  # as what they are compared with
        return passes * forward.evaluation().seconds

    def evaluation(self) -> Evaluation:
        """Returns what a forward pass takes, beside parameters alone."""
        work = self._work()
        waits = sum(e.seconds * (1 - e.hidden) for e in self._exchanges())
        seconds = self.turns * self._layer_seconds(work) + waits
        seconds += self.passes * work.head / self._rates_of_products().products
        return Evaluation(sum(self.evaluation_memory().values()), seconds)

    def _layer_seconds(self, work: Work) -> float:
        """Returns seconds that layers take for one micro-batch."""
        reached = self._rates_of_products()
        moving = self.chip.bandwidth * self.rates.memory
        moved, _ = self._passed_bytes()
        products = work.layers / reached.products + work.rounded / reached.rounded
        beside = work.attention / reached.scores + self._rule_seconds(work)
        return products + beside + moved / moving

    def _rule_seconds(self, work: Work) -> float:
        """Returns seconds that layers take for the delta rule in one micro-batch.

        Its products take the longer of what they compute and of what they hand on by main memory.
        """
        moving = self.chip.bandwidth * self.rates.memory
        passed, handed = self._rule_bytes()
        products = work.recurrence / self._rates_of_products().products
        return passed / moving + max(products, handed / moving)

    def _rule_bytes(self) -> tuple[float, float]:
        """Returns bytes of the rule in a micro-batch: `passed` and `handed` of `Traffic`."""
        each = self._traffic
        passed = self._of_rule(each.passed, each.passed_back)
        return passed, self._of_rule(each.handed, each.handed_back)

    def _passed_bytes(self) -> tuple[float, float]:
        """Returns bytes that memory passes: of layers in a micro-batch, of all else in a step."""
        numbers = _PASSED[0] * self._widths[names.INPUTS] + _PASSED[1] * self.hidden
        # Copies of tokens are written and read, there and back.
        numbers += 2 * self.room * self._routed()
        # Scores are written, read twice and made weights, which are written and read.
        scores = self.attending * self._heads() * self.length * (3 * 4 + 2 * self.itemsize)
        of_token = self.itemsize * numbers + (0.0 if self.placed.flash else scores)
        repeated = self.remat not in ("none", "dots") or self.stages > 1
        runs = 1 + self.back * (1 + repeated)
        codes = self._codes() if self.matmul else 0.0
        logits = 4 * 4 * self.tokens * self._vocab()
        state = 2 * self.placed.parameters + 2 * self.optimizer
        sums = 3 * self.placed.gradients
        of_layers = self.tokens * self.layers * (runs * of_token + codes)
        # What is kept is written, and read again.
        of_layers += 2 * self._kept_bytes()[0]
        return of_layers, (logits + sums) * self.passes + state

    # Communication.

    def _exchanges(self) -> tuple[Exchanged, ...]:
        """Returns what is exchanged by kind and axes."""
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
        weights, tokens = (
            [self._collective(*key, payload) for key, payload in table.items()]
            for table in (of_weights, of_tokens)
        )
        hidden = self._hidden(sum(map(self._seconds, weights)))
        return tuple(
            Exchanged(one, self._seconds(one), share, DCN if self.network.leaves(one) else ICI)
            for table, share in ((weights, hidden), (tokens, 0.0))
            for one in table
        )

    def _hidden(self, seconds: float) -> float:
        """Returns the share of exchanges of weights, which take some time, that hides."""
        if not self.is_tpu:
            return _HIDDEN_ON_GPU
        by_copies = _HIDDEN_BY_COPIES if self.chip.hops else 0.0
        most = _HIDDEN_BY_SPARSE_CORES if self.chip.offloads else by_copies
        beside = self.passes * self._layer_seconds(self._work())
        return min(most, beside / seconds) if seconds else most

    def _seconds(self, one: Collective) -> float:
        summed = one.kind in ("all-reduce", "reduce-scatter")
        return self.network.seconds(one) / (self.rates.sums if summed else self.rates.links)

    def _of_weights(self, add: Callable[[str, tuple[str, ...], float], None]) -> None:
        """Adds what travels of weights and of their gradients."""
        times = self.layers * self.turns
        uses = [(weight, times * weight.share, 1 + self.back) for weight in self.placed.weights]
        # What is outside of layers is gathered once: its backward pass finds it there.
        outside = (self.placed.head, self.placed.projection)
        uses += [(weight, self.passes, 1) for weight in outside if weight is not None]
        for weight, times, gathers in uses:
            plan = weight.plan
            parts = self._parts(plan.held)
            size = weight.stored or math.prod(weight.shape) * self._itemsize_of(weight)
            travels, whole = size / parts, math.prod(weight.shape) * self.itemsize / parts
            gathered = tuple(name for group in plan.gathered for name in group)
            add("all-gather", gathered, gathers * travels * times)
            if self.learns and weight.trained:
                scattered, rest = _reduced(plan)
                add("reduce-scatter", scattered, whole * times)
                add("all-reduce", rest, whole / self._parts(plan.scattered) * times)
        if not self.learns:
            return
        for table in self.placed.trained_tables:
            # Rows of the table travel, and its gradient in the parameters' type.
            cut = self._parts(table.plan.held) * self._parts(table.plan.gathered)
            columns = tuple(name for group in table.plan.gathered for name in group)
            rest = tuple(name for name in _reduced(table.plan)[1] if name not in columns)
            size = math.prod(table.shape) * self.param_itemsize
            add("all-reduce", rest, self.passes * size / cut)
        for path, extra in self.placed.updated.items():
            add("all-gather", extra, self.placed.bytes_of(path))

    def _of_tokens(self, add: Callable[[str, tuple[str, ...], float], None]) -> None:
        """Adds what travels of tokens: between parts of heads, of rows, of experts, of stages.

        The formulas are those of docs/sharding.md.
        """
        m = self.model
        stream = self.tokens * m.embed * self.itemsize
        numbers = (layer.kv_heads * (layer.head_dim + layer.value_dim) for layer in m.attending)
        keys = self.tokens * sum(numbers) / 2 / m.layers * self.itemsize
        times = self.layers * self.turns
        self._of_halves(add, times * stream)
        parts = self._split("seq", self.length)
        hops = (2 + (6 if self.itemsize == 2 else 4) * self.back) * parts - 2 - 2 * self.back
        hops += 2 * (parts - 1) * (names.ATTENTION in self.again)
        add("collective-permute", self._axes("seq", self.length), times * keys * hops)
        if m.experts:
            axes = self._axes("act_experts", m.experts.count)
            runs = 2 + 2 * self.back + 2 * (names.MLP in self.again)
            add("all-to-all", axes, runs * self.chosen * times * stream)
        stages = self._axes("layers", m.layers)
        add("collective-permute", stages, (1 + self.back) * self.turns * stream)
        add("all-reduce", stages, (2 + 2 * self.back) * self.passes * stream)

    def _of_halves(self, add: Callable[[str, tuple[str, ...], float], None], stream: float) -> None:
        """Adds sums of the stream after each half of a layer, and of its gradient before each.

        Where the stream is split between them, a gather and a scatter stand for each sum, and what
        a product reads is gathered once more for the gradient of its weight.
        """
        axes = self._axes("act_mlp", self.model.mlp)
        again = len(self.again & {names.ATTENTION_OUT, names.MLP_OUT})
        sums = 2 + 2 * self.back + again
        if set(self._axes("stream_seq", self.length)) & set(axes):
            gathers = sums if self.again else sums + 2 * self.back
            add("all-gather", axes, gathers * stream)
            add("reduce-scatter", axes, sums * stream)
        else:
            add("all-reduce", axes, sums * stream)

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
