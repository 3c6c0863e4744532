"""Pipeline parallelism: groups of layers on different devices, micro-batches that pass through.

The schedule is 1F1B in lockstep. With S stages, micro-batch m is run forward by stage s in turn
m + s and backward in turn m + 2 (S - 1) - s, so that the last stage turns each one around at once:

    turn     0    1    2    3    4    5    6           S = 3, M = 3
    stage 0  F0   F1   F2        B0   B1   B2          M + S - 1 turns of F and of B
    stage 1       F0   F1   F2
                       B0   B1   B2        …           a stage keeps at most 2 S - 1 inputs

The first S - 1 turns run forward alone, the last S - 1 backward alone and the M between them both:
the idle share is (S - 1) / (M + S - 1), that of 1F1B (Narayanan et al., arXiv:2006.09503), and what
is kept does not grow with M. A stage keeps its inputs alone and runs forward again in its backward
turn. All stages run one program, over arrays with an axis of stages that the mesh splits.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxft.data.batch import Batch
from jaxft.models.decoder import Decoder, LayerIndex
from jaxft.models.layers import Routing
from jaxft.models.module import Params, merge
from jaxft.sharding.rules import Placement, place
from jaxft.training.objectives.bound import Judged

_LAYERS = "layers."
_TOKENS = ("batch", "seq")


class _Arrived:
    """A model whose layers have run elsewhere on one micro-batch, as an objective sees it."""

    def __init__(self, model: Decoder, batch: Batch, hidden: Array, routing: Routing | None):
        self._batch, self._hidden, self._routing = batch, hidden, routing
        self._is_asked = False
        self.config, self.precision = model.config, model.precision
        self.head_table = model.head_table

    def hidden(
        self, tokens: Array, positions: Array, segments: Array, seeds: Array | None = None
    ) -> tuple[Array, Routing | None]:
        """Returns what came out of the last stage, normalised.

        Raises:
          RuntimeError: For other tokens than those that passed the stages, and when asked twice:
            there is one pass.
        """
        batch = self._batch
        same = (tokens is batch.tokens, positions is batch.positions, segments is batch.segments)
        if self._is_asked or not all(same):
            raise RuntimeError(
                "In a pipeline an objective can score the rows of its micro-batch, once; it asked "
                "for other rows or a second time. Make what needs another pass a column of the "
                "batch: Objective.reference or Objective.whole."
            )
        self._is_asked = True
        return self._hidden, self._routing


class _Stream(NamedTuple):
    """The values that stages hand on, with a leading axis of stages.

    Attributes:
      x: `[S, B, T, D]`, the residual stream.
      routing: Sums over the layers so far of what routers did, or None.
    """

    x: Array
    routing: Routing | None


class _Stages:
    """A model cut into stages, and the turns they take."""

    def __init__(self, graphdef: Any, params: Params, batch: Batch, placement: Placement):
        self.graphdef, self.placement, self.batch = graphdef, placement, batch
        (self.axis,) = placement.split("layers")
        self.count = placement.mesh.shape[self.axis]
        self.layers, self.rest = _parted(params, self.count)
        self.template: Decoder = merge(graphdef, params)
        self.index = jax.tree.map(lambda x: x.reshape(self.count, -1), self.template.index)

    def model(self, rest: Params) -> Decoder:
        """Returns the model for what lies outside its layers."""
        return merge(self.graphdef, {**_joined(self.layers), **rest})

    def micro(self, index: Array) -> Batch:
        """Returns one micro-batch; the first or last one for an index beyond."""
        return jax.tree.map(lambda x: x[jnp.clip(index, 0, x.shape[0] - 1)], self.batch)

    def micros(self, indices: Array) -> dict[str, Array]:
        """Returns what layers read of the micro-batch at each stage, `[S, B, T]`."""
        return {
            name: self.staged(jnp.take(self.batch[name], indices, axis=0, mode="clip"), *_TOKENS)
            for name in ("positions", "segments", "seeds")
            if name in self.batch
        }

    def staged(self, x: Array, *axes: str) -> Array:
        """Places an array with a leading axis of stages."""
        spec = self.placement.spec(axes, x.shape[1:], "an activation")
        return place(x, NamedSharding(self.placement.mesh, P(self.axis, *spec)))

    def empty(self) -> _Stream:
        """Returns a stream in which no micro-batch is under way."""
        model, micro = self.template, jax.tree.map(lambda x: x[0], self.batch)
        shape = (*micro.tokens.shape, model.config.embed)
        x = jnp.zeros((self.count, *shape), model.numerics.compute_dtype)
        x = self.staged(x, "batch", "stream_seq", "act_embed")
        if model.config.experts is None:
            return _Stream(x, None)
        each, one = (jnp.zeros((self.count, *n)) for n in ((model.config.experts.count,), ()))
        return _Stream(x, Routing(each, each, one, one))

    def run(self, layers: Params, x: Array, indices: Array) -> tuple[Array, Routing | None]:
        """Runs each stage on its own input; routing is of each layer, `[S, L / S, …]`."""
        return self._vmap(self._stage)(layers, x, self.micros(indices), self.index)

    def pull(
        self, layers: Params, fixed: Params, x: Array, indices: Array, d: _Stream
    ) -> tuple[Params, Array]:
        """Returns gradients of the layers' parameters, and of each stage's input.

        Args:
          layers: Parameters that gradients are asked for.
          fixed: The others.
          x: Each stage's input, `[S, B, T, D]`.
          indices: Which micro-batch that is.
          d: Gradient of what each stage handed on.
        """

        def of_stage(
            layers: Params, fixed: Params, x: Array, d: _Stream, *inputs: Any
        ) -> tuple[Params, Array]:
            def forward(layers: Params, x: Array) -> _Stream:
                x, routing = self._stage({**layers, **fixed}, x, *inputs)
                return _Stream(x, _over_layers(routing, axis=0))

            return jax.vjp(forward, layers, x)[1](d)

        return self._vmap(of_stage)(layers, fixed, x, d, self.micros(indices), self.index)

    def _stage(
        self, layers: Params, x: Array, columns: dict[str, Array], index: tuple[LayerIndex, ...]
    ) -> tuple[Array, Routing | None]:
        return self.template.through(layers, index, x, **columns)

    def _vmap(self, function: Callable) -> Callable:
        return jax.vmap(function, spmd_axis_name=self.axis)

    def hand_on(self, stream: _Stream, first: Array) -> _Stream:
        """Moves each stage's output to the next one; the first gets `first` and no sums."""
        return _Stream(
            self._at(0, first, self._shifted(stream.x, 1)),
            jax.tree.map(lambda x: self._shifted(x, 1), stream.routing),
        )

    def hand_back(self, d: _Stream, last: _Stream) -> _Stream:
        """Moves each stage's gradient to the one before; the last stage gets `last`."""
        return jax.tree.map(
            lambda d, last: self._at(self.count - 1, last, self._shifted(d, -1)), d, last
        )

    def last(self, stream: _Stream) -> _Stream:
        """Returns what the last stage gave, on the devices of all stages."""
        return jax.tree.map(lambda x: self._take(x, self.count - 1), stream)

    def first(self, x: Array) -> Array:
        """Returns what the first stage gave, on the devices of all stages."""
        return self._take(x, 0)

    def _at(self, stage: int, value: Array, x: Array) -> Array:
        stages = jnp.arange(self.count).reshape(-1, *[1] * value.ndim)
        return jnp.where(stages == stage, value[None], x)

    def _shifted(self, x: Array, by: int) -> Array:
        """Sends a stage's part to a neighbour; zeros come in where there is none."""
        pairs = [(s, s + by) for s in range(self.count) if 0 <= s + by < self.count]
        return self._map(lambda x: jax.lax.ppermute(x, self.axis, pairs), x, stages=True)

    def _take(self, x: Array, stage: int) -> Array:
        def local(x: Array) -> Array:
            mine = jax.lax.axis_index(self.axis) == stage
            return jax.lax.psum(jnp.where(mine, x[0], 0), self.axis)

        return self._map(local, x, stages=False)

    def _map(self, function: Callable, x: Array, *, stages: bool) -> Array:
        axes = ("batch", "stream_seq", "act_embed") if x.ndim == 4 else ()
        spec = self.placement.spec(axes, x.shape[1:] if axes else (), "an activation")
        split = P(self.axis, *spec)
        return self.placement.shard_map(function, split, split if stages else spec)(x)


def accumulate(
    graphdef: Any,
    judge: Callable[[Any, Batch], Judged],
    trainable: Params,
    frozen: Params,
    batch: Batch,
    *,
    placement: Placement,
    shardings: Mapping[str, Any],
) -> tuple[Params, Judged]:
    """Sums gradients and terms over micro-batches that pass through the stages.

    Args:
      graphdef: Structure of the model.
      judge: Maps model and micro-batch to sums; it may ask the model for hidden states once.
      trainable: Parameters that gradients are asked for.
      frozen: The others.
      batch: `[M, B, T]`.
      placement: Splits layers over one mesh axis.
      shardings: Of each gradient.

    Returns:
      float32 gradients and the terms.
    """
    stages = _Stages(graphdef, {**trainable, **frozen}, batch, placement)
    count, micros = stages.count, batch.tokens.shape[0]
    kept = 2 * count - 1
    of_stage = jnp.arange(count)
    layers, rest = _parted(trainable, count)
    fixed_layers, fixed_rest = _parted(frozen, count)

    def embed(rest: Params, micro: Batch) -> Array:
        return stages.model({**rest, **fixed_rest}).embedded(micro.tokens, micro.positions)

    def judge_last(rest: Params, out: _Stream, micro: Batch) -> tuple[Array, Judged]:
        model = stages.model({**rest, **fixed_rest})
        # The objective sees all layers as one: what it makes of routing is made of sums over them.
        routing = jax.tree.map(lambda x: x[None], out.routing)
        judged = judge(_Arrived(model, micro, model.norm(out.x), routing), micro)
        return judged.minimised, judged._replace(routing=None)

    def forward(carry: dict, turn: Array) -> dict:
        stream = stages.hand_on(carry["stream"], embed(rest, stages.micro(turn)))
        inputs = jax.lax.dynamic_update_index_in_dim(carry["inputs"], stream.x, turn % kept, 1)
        indices = turn - of_stage
        x, routing = stages.run({**layers, **fixed_layers}, stream.x, indices)
        real = ((indices >= 0) & (indices < micros)).astype(jnp.float32)
        routing = jax.tree.map(lambda r: r * real.reshape(-1, *[1] * (r.ndim - 1)), routing)
        return carry | {
            "stream": _Stream(x, _add(stream.routing, _over_layers(routing, axis=1))),
            "inputs": inputs,
            "routing": _add(carry["routing"], routing),
        }

    def backward(carry: dict, turn: Array, d_last: _Stream) -> dict:
        d = stages.hand_back(carry["d"], d_last)
        indices = turn - 2 * (count - 1) + of_stage
        places = (indices + of_stage) % kept
        inputs = jax.vmap(lambda x, i: x[i])(carry["inputs"], places)
        d_layers, d_x = stages.pull(layers, fixed_layers, inputs, indices, d)
        first = stages.micro(turn - 2 * (count - 1))
        (d_rest,) = jax.vjp(lambda rest: embed(rest, first), rest)[1](stages.first(d_x))
        return carry | {
            "d": _Stream(d_x, d.routing),
            "gradients": _summed(carry["gradients"], _joined(d_layers) | d_rest, shardings),
        }

    def both(carry: dict, turn: Array) -> dict:
        carry = forward(carry, turn)
        judged_last = jax.value_and_grad(judge_last, argnums=(0, 1), has_aux=True)
        out = stages.last(carry["stream"])
        (_, judged), (d_rest, d_out) = judged_last(rest, out, stages.micro(turn - count + 1))
        carry = carry | {
            "gradients": _summed(carry["gradients"], d_rest, shardings),
            "judged": carry["judged"] + judged,
        }
        return backward(carry, turn, d_out)

    def nothing_back(carry: dict, turn: Array) -> dict:
        return backward(carry, turn, _zeros(stages.last(carry["stream"])))

    empty = stages.empty()
    inputs = jnp.zeros((count, kept, *empty.x.shape[1:]), empty.x.dtype)
    each_layer = jax.eval_shape(
        lambda: stages.run({**layers, **fixed_layers}, empty.x, of_stage)[1]
    )
    _, judged = jax.eval_shape(judge_last, rest, stages.last(empty), stages.micro(jnp.int32(0)))
    carry = {
        "stream": empty,
        "inputs": stages.staged(inputs, "turns", "batch", "stream_seq", "act_embed"),
        "routing": _zeros(each_layer),
        "d": empty,
        "gradients": {
            p: place(jnp.zeros(w.shape, jnp.float32), shardings[p]) for p, w in trainable.items()
        },
        "judged": _zeros(judged),
    }
    turns = (count - 1, micros, count - 1)
    for function, start, length in zip(
        (forward, both, nothing_back), (0, turns[0], turns[0] + turns[1]), turns, strict=True
    ):
        carry = _take_turns(function, carry, start, length)
    routing = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carry["routing"])
    return carry["gradients"], carry["judged"]._replace(routing=routing)


def map_micros(
    graphdef: Any,
    function: Callable[[Any, Batch], Any],
    params: Params,
    batch: Batch,
    *,
    placement: Placement,
) -> Any:
    """Returns what a function makes of each micro-batch, along a leading axis; without gradients.

    Args:
      graphdef: Structure of the model.
      function: Maps model and micro-batch to arrays; it may ask for hidden states once.
      params: All parameters.
      batch: `[M, B, T]`.
      placement: Splits layers over one mesh axis.
    """
    stages = _Stages(graphdef, params, batch, placement)
    count = stages.count

    def turn(carry: dict, turn: Array) -> dict:
        micro = stages.micro(turn)
        first = stages.model(stages.rest).embedded(micro.tokens, micro.positions)
        stream = stages.hand_on(_Stream(carry["x"], None), first)
        x, _ = stages.run(stages.layers, stream.x, turn - jnp.arange(count))
        return {"x": x}

    def last(carry: dict, index: Array) -> tuple[dict, Any]:
        carry = turn(carry, index)
        model, micro = stages.model(stages.rest), stages.micro(index - count + 1)
        out = stages.last(_Stream(carry["x"], None))
        return carry, function(_Arrived(model, micro, model.norm(out.x), None), micro)

    carry = _take_turns(turn, {"x": stages.empty().x}, 0, count - 1)
    return jax.lax.scan(last, carry, count - 1 + jnp.arange(batch.tokens.shape[0]))[1]


def map_rows(
    graphdef: Any,
    function: Callable[[Any, Batch], Any],
    params: Params,
    batch: Batch,
    *,
    placement: Placement,
) -> Any:
    """Returns what a function makes of rows that pass through the stages in parts.

    Args:
      graphdef: Structure of the model.
      function: Maps model and rows to arrays with a leading axis of rows.
      params: All parameters.
      batch: `[B, T]`; B is a multiple of `placement.row_multiple`.
      placement: Splits layers over one mesh axis.
    """
    parts = deal(batch, placement)
    found = map_micros(graphdef, function, params, parts, placement=placement)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), found)


def deal(batch: Batch, placement: Placement) -> Batch:
    """Deals rows `[B, T]` out to as many micro-batches as there are stages, `[S, B / S, T]`.

    Each device's rows are dealt, so that all micro-batches are split like the batch.
    """
    count = placement.parts("layers")
    return batch.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0))


def _take_turns(function: Callable, carry: dict, start: int, length: int) -> dict:
    if not length:
        return carry
    turns = start + jnp.arange(length)
    return jax.lax.scan(lambda carry, turn: (function(carry, turn), None), carry, turns)[0]


def _parted(params: Params, stages: int) -> tuple[Params, Params]:
    """Separates parameters of layers, `[S, L / S, …]` without the prefix, from the others."""
    layers = {
        path.removeprefix(_LAYERS): w.reshape(stages, -1, *w.shape[1:])
        for path, w in params.items()
        if path.startswith(_LAYERS)
    }
    return layers, {path: w for path, w in params.items() if not path.startswith(_LAYERS)}


def _joined(layers: Params) -> Params:
    """Inverse of `_parted` for layers."""
    return {_LAYERS + path: w.reshape(-1, *w.shape[2:]) for path, w in layers.items()}


def _over_layers(routing: Routing | None, *, axis: int) -> Routing | None:
    return jax.tree.map(lambda x: jnp.sum(x, axis=axis), routing)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _summed(sums: Params, gradients: Params, shardings: Mapping[str, Any]) -> Params:
    """Adds the gradients that there are, each in its placement."""
    return {
        path: place(total + gradients[path].astype(jnp.float32), shardings[path])
        if path in gradients
        else total
        for path, total in sums.items()
    }
