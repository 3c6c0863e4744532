"""The memory of a run in closed form: what a device holds, keeps and has in hand."""

import functools
import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp

from jaxft.config import RunConfig
from jaxft.models import activations as names
from jaxft.models.config import make_numerics
from jaxft.models.experts import tokens_of_expert
from jaxft.models.families import Architecture
from jaxft.planner.kernels import Recurrence, Traffic, delta_rule, delta_traffic
from jaxft.planner.network import Network
from jaxft.planner.placed import Placed, Weight
from jaxft.planner.timeline import Rates
from jaxft.planner.topology import Topology
from jaxft.sharding.axes import ACTIVATION_OF
from jaxft.sharding.rules import as_names

# Dimensions of what attention makes of the stream, and of what it is made of on its way.
HEADS = ("heads", "kv_heads", "to_latent")
# Norms of a layer that the residual stream passes, or what is added to it.
_STREAM_NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
# Bytes of a program.
_PROGRAM = 50 << 20


class Footprint:
    """Sizes of a run on one device, and the memory they take.

    Args:
      architecture: The model.
      topology: The hardware.
      rates: Shares of published rates that are reached.
      config: The run's.
      placed: The model where the run's strategy puts it.
      evaluated: Rows of an evaluation step of all devices; 0: it is a training step.
    """

    def __init__(
        self,
        architecture: Architecture,
        topology: Topology,
        rates: Rates,
        config: RunConfig,
        placed: Placed,
        *,
        evaluated: int = 0,
    ):
        self.config, self.placed, self.placement = config, placed, placed.placement
        placement = placed.placement
        self.made_for, self.objective = (architecture, topology, rates), config.objective
        self.model = architecture.config
        self.chip = topology.chip.core
        self.rates = rates
        self.network = Network(topology.chip, placement.mesh, topology.shape)
        self.is_tpu = topology.chip.is_tpu
        numerics = make_numerics(config.model.dtypes)
        self.itemsize = jnp.dtype(numerics.compute_dtype).itemsize
        self.param_itemsize = jnp.dtype(numerics.param_dtype).itemsize
        self.learns = not evaluated
        self.stages = max(1, self._split("layers", self.model.layers))
        # Rows that are evaluated pass through stages in as many micro-batches.
        self.passes = self.stages if evaluated else config.train.accumulation
        self.rows = (evaluated or config.train.batch_size) // self.passes
        self.length = config.data.max_length
        # Positions of a row that a device has, and its tokens in one micro-batch.
        self.part = self.length / self._split("seq", self.length)
        self.tokens = self.rows * self.part / self._split("batch", self.rows)
        self.layers = self.model.layers / self.stages
        self.turns = self.passes + (self.stages - 1 if self.stages > 1 else 0)
        # Evaluation rounds no product and drops no token.
        self.matmul = config.model.matmul if self.learns else ""
        self._size_experts(config.model.expert_capacity if self.learns else 0.0)
        # 1 if there is a backward pass through the layers.
        self.back = int(self.learns and placed.reaches_layers)
        # An evaluation keeps nothing, whatever the run says.
        self.remat = config.model.remat if self.learns else "none"
        self.kept = names.kept(self.remat)
        offload = config.model.offload if self.learns else ""
        self.offloaded = names.offloaded(self.remat, offload)
        self.again = self._again()

    @functools.cached_property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state on a device."""
        return self.placed.optimizer(self.config.optim)

    def _size_experts(self, capacity: float) -> None:
        """Sets the experts that a token takes, and room for how many times as many."""
        experts = self.model.experts
        self.chosen, self.room = 1.0, 1.0
        if experts:
            parts = self._split("act_experts", experts.count)
            self.chosen = float(experts.chosen)
            if capacity:
                taken = tokens_of_expert(experts, capacity, self.length)
                self.chosen = experts.count * taken / self.length
            elif parts > 1:
                # In the worst case all tokens of all peers come to one device (models/experts.py).
                self.room = parts * min(experts.chosen, experts.count / parts) / experts.chosen
        # Numbers of each token at the hidden width of the feed-forward part.
        self.hidden = self._made("mlp", reads=False)

    def _again(self) -> frozenset[str]:
        """Returns what the backward pass makes again."""
        if self.remat == "none" or not self.back:
            return frozenset()
        if self.remat == "dots":
            return frozenset({names.ATTENTION})
        made = {names.QKV, names.ATTENTION, names.ATTENTION_OUT, names.MLP} - self.kept
        if self.model.parallel:  # nothing in the layer reads what attention adds
            made.discard(names.ATTENTION_OUT)
        # Of experts all products have one name.
        last = names.MLP if self.model.experts else names.MLP_OUT
        if self.placed.reads_mlp_out and last not in self.kept:
            made.add(names.MLP_OUT)
        return frozenset(made)

    def evaluation_memory(self) -> dict[str, int]:
        """Returns bytes of a forward pass by kind."""
        kinds = {
            "parameters": self.placed.parameters,
            "batch": self._batch_bytes() * self.passes,
            "logits": self._logits_bytes() / 2,  # without a gradient
            "weights": self._layer_weights(),
            "temporaries": self._layer_working_set() / 2 + self._own_inputs_bytes(),
            "program": _PROGRAM,
        }
        return {kind: round(size) for kind, size in kinds.items()}

    def _split(self, axis: str, size: int) -> int:
        """Returns how many parts a named dimension of a size is cut into."""
        return math.prod(self.placement.mesh.shape[name] for name in self._axes(axis, size))

    def _axes(self, axis: str, size: int) -> tuple[str, ...]:
        """Returns the mesh axes that cut a named dimension of a size."""
        [entry] = self.placement.spec((axis,), (size,), "an estimate")
        return as_names(entry)

    def _heads(self) -> float:
        return self.model.heads / self._split("act_heads", self.model.heads)

    def _vocab(self) -> float:
        return self.model.vocab / self._split("act_vocab", self.model.vocab)

    def memory(self) -> tuple[dict[str, int], int]:
        """Returns bytes of a training step by kind, and those in the host's memory."""
        summed = 4 / self.param_itemsize if self.passes > 1 else 1.0
        kept, host = self._kept_bytes()
        kept += self._own_inputs_bytes()
        if self.stages > 1:
            # A stage keeps its input alone of each micro-batch that is under way.
            stream = self.tokens * self._widths[names.INPUTS] * self.itemsize
            kept += (2 * self.stages - 1) * stream
        gradients = self.placed.gradients
        kinds = {
            "parameters": self.placed.parameters,
            "optimizer": self.optimizer,
            "reference": self.placed.reference * (self.objective.uses_reference == "fixed"),
            "batch": self._batch_bytes() * self.passes,
            "gradients": gradients * (summed + (1 if self.passes > 1 else 0)),
            "activations": kept,
            "logits": 0.0,
            "weights": 0.0,
            "temporaries": 0.0,
            "program": _PROGRAM,
        }
        # What the head has in hand is gone when layers run backward: the fuller moment counts.
        head = self._vocab() * self.model.embed
        # Its gradient is summed in float32.
        gradient = 4 * head * self.placed.head.trained
        at_head = {"logits": self._logits_bytes() + gradient, "weights": head * self.itemsize}
        in_layers = {"weights": self._layer_weights(), "temporaries": self._layer_working_set()}
        kinds |= max(at_head, in_layers, key=lambda moment: sum(moment.values()))
        return {kind: round(size) for kind, size in kinds.items()}, round(host)

    def _batch_bytes(self) -> float:
        columns = 5 if self.objective.objective.units == "documents" else 7
        return 4 * (columns + (self.objective.uses_reference == "cached")) * self.tokens

    def _logits_bytes(self) -> float:
        """Returns bytes of one chunk's logits and their gradient, float32."""
        chunk = min(self.config.objective.chunk or self.tokens, self.tokens)
        return 2 * 4 * chunk * self._vocab()

    def _layer_weights(self) -> float:
        """Returns bytes of two layers' weights as a device multiplies with them."""
        return 2 * sum(
            math.prod(weight.shape)
            * weight.share
            * self._itemsize_of(weight)
            / self._parts(weight.plan.held)
            for weight in self.placed.weights
        )

    def _own_inputs_bytes(self) -> float:
        """Returns bytes of all layers' inputs, which are there while these run.

        How often they are there at once was counted in compiled steps: as they are made, whole and
        by layer; so are their gradients, and those of tables once more as they travel.
        """
        times = 3
        if self.back:
            times += self.placed.reaches_own_inputs + 2 * bool(self.placed.trained_tables)
            times += {"none": 7, "dots": 1}.get(self.remat, 0)
        return times * self.tokens * self.model.layers * self.model.per_layer * self.itemsize

    def _itemsize_of(self, weight: Weight) -> int:
        """Returns the bytes of a number of a weight as it travels and is multiplied."""
        return 1 if self.matmul and weight.dense else self.itemsize

    @functools.cached_property
    def _widths(self) -> dict[str, float]:
        """Numbers that a device makes of a token in a layer, by activation; the mean of layers."""
        m = self.model
        stream = m.embed * self._split("seq", self.length)
        stream /= self._split("stream_seq", self.length)
        shared_keys = self._heads() * m.latent.turned_dim if m.latent else 0.0
        log_sums = self.attending * self._heads() * 4 / self.itemsize
        return {
            names.INPUTS: stream,
            names.QKV: self._made_of_heads(reads=True) + shared_keys,
            names.ATTENTION: self._made_of_heads(reads=False) + log_sums,
            names.ATTENTION_OUT: stream,
            names.MLP: self._made("mlp", reads=True),
            names.MLP_OUT: stream,
        }

    @functools.cached_property
    def attending(self) -> float:
        """Share of the layers that have attention."""
        return len(self.model.windows) / self.model.layers

    def _made(self, *axes: str, reads: bool) -> float:
        """Returns numbers that a device makes of a token in a layer; the mean of layers.

        Args:
          axes: Names of the dimensions that are counted.
          reads: Whether they are what is made of the stream or of a latent; else what these are
            made of.
        """
        return sum(numbers for _, numbers, _ in self._between(*axes, reads=reads))

    def _between(self, *axes: str, reads: bool) -> Iterator[tuple[Weight, float, int]]:
        """Yields weights, what `_made` adds up of each, and the size of the stream or latent."""
        for weight in self.placed.weights:
            sizes = dict(zip(weight.axes, weight.shape, strict=True))
            axis = next((axis for axis in axes if axis in sizes), None)
            end = next((end for end in ("embed", "latent") if end in sizes), None)
            if axis is None or end is None or weight.beside:
                continue
            if (weight.axes[-1] == end) == reads:
                numbers = sizes[axis] / self._split(ACTIVATION_OF[axis], sizes[axis])
                numbers *= sizes.get("head_dim", 1) * (self.chosen if weight.routed else 1.0)
                yield weight, weight.share * numbers, sizes[end]

    def _made_of_heads(self, *, reads: bool) -> float:
        """Returns those of heads, and of latents that these are made of."""
        return self._made(*HEADS, reads=reads)

    @functools.cached_property
    def _recurrent(self) -> Recurrence:
        """Work of the delta rule on a token on a device, the mean over layers."""
        return self._of_delta(delta_rule, Recurrence)

    @functools.cached_property
    def _traffic(self) -> Traffic:
        """Memory traffic of the delta rule for a token on a device, the mean over layers."""
        # Cores that share a kernel have a memory of their own each.
        stays = self.is_tpu and self.chip.kernel_cores == 1
        return self._of_delta(functools.partial(delta_traffic, stays=stays), Traffic)

    def _of_delta[T: (Recurrence, Traffic)](self, count: Callable[..., T], kind: type[T]) -> T:
        """Returns what a function counts of the heads on a device, the mean over layers."""
        d = self.model.delta
        if d is None:
            return kind(*[0.0] * len(kind._fields))
        values = d.value_heads / self._split("act_heads", d.value_heads)
        keys = d.key_heads / self._split("act_kv_heads", d.key_heads)
        platform = "tpu" if self.is_tpu else "gpu"
        found = count(d, self.length, self.itemsize, platform, values=values, keys=keys)
        return kind(*((1 - self.attending) * number for number in found))

    def _routed(self) -> float:
        """Returns numbers of each token that go to experts and come back."""
        return 2 * self.chosen * self.model.embed if self.model.experts else 0.0

    def _kept_bytes(self) -> tuple[float, float]:
        """Returns bytes that wait for the backward pass, on the device and on the host."""
        if not self.back:
            return 0.0, 0.0
        widths = self._widths
        of_token = self.tokens * self.layers * self.itemsize
        if self.remat == "none":
            return of_token * self._kept_of_all(), 0.0
        kept = {names.INPUTS, *self.kept}
        if self.remat == "dots":
            kept = set(widths) - {names.ATTENTION}
        there = sum(widths[name] for name in self.offloaded)
        here = sum(widths[name] for name in kept - self.offloaded)
        if names.MLP in kept:
            here += (self.room - 1) * widths[names.MLP] + self.room * self._routed() / 2
        return of_token * here, of_token * there

    def _kept_of_all(self) -> float:
        """Returns numbers of a token that each operation of a layer keeps for its own gradient.

        What products read; of the activation and its gate the input, the results, and what lies
        between, four times the hidden width; of norms three numbers in float32 for each of theirs.
        """
        widths = self._widths
        read = widths[names.QKV] + widths[names.ATTENTION] + 2 * widths[names.INPUTS]
        of_mlp = self.room * (widths[names.MLP] + 4 * self.hidden + self._routed())
        scores = 0.0 if self.placed.flash else self._scores() / self.itemsize
        recurrent = self._recurrent.kept / self.itemsize
        return read + of_mlp + 3 * 4 / self.itemsize * self._normed() + scores + recurrent

    def _normed(self) -> float:
        """Returns numbers of a token that norms pass on a device in a layer; the mean of layers."""
        m, stream = self.model, self._widths[names.INPUTS]
        heads = {
            "q_norm": m.heads / self._split("act_heads", m.heads),
            "k_norm": m.kv_heads / self._split("act_kv_heads", m.kv_heads),
        }
        if m.norm == "rms_bare":  # there is no parameter to find them by
            return 2 * stream + sum(heads.values()) * m.head_dim
        total, layers = 0.0, sum(map(len, self.placed.abstract.stacks.values()))
        for path, leaf in self.placed.abstract.params.items():
            part = path.removesuffix(".scale").rpartition(".")[2]
            if not path.endswith(".scale"):
                continue
            if m.latent is not None and part in ("q_norm", "kv_norm"):  # of latents
                total += leaf.shape[0] / layers * leaf.shape[-1]
            elif part in (*_STREAM_NORMS, *heads):
                # One weight for all heads, or one for each.
                numbers = heads[part] * m.head_dim if part in heads else stream
                total += leaf.shape[0] / layers * numbers
        return total

    def _scores(self) -> float:
        """Returns bytes of a token's scores: float32, their weights, and which are hidden."""
        return self.attending * self._heads() * self.length * (4 + self.itemsize + 1)

    def _layer_working_set(self) -> float:
        """Returns bytes that the backward pass of one layer has in hand."""
        widths = self._widths
        at_once = self.room * (widths[names.MLP] + self.hidden + self._routed())
        at_once += 6 * widths[names.INPUTS] + 2 * widths[names.QKV]
        # Scores and their gradient, and weights of values.
        scores = 0.0 if self.placed.flash else self._scores() + 4 * self._heads() * self.length
        return self.tokens * (self.itemsize * at_once + max(scores, self._recurrent.in_hand))

    def _parts(self, cut: tuple[tuple[str, ...], ...]) -> int:
        return math.prod(self.placement.mesh.shape[name] for group in cut for name in group)
