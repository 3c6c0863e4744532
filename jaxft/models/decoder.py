"""A decoder-only transformer: embedding, a scanned stack of one family's blocks, norm and head."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxft.models import activations
from jaxft.models.attention import attend, row_attention, row_mask
from jaxft.models.cache import (
    Cache,
    Memory,
    cached_attention,
    empty_cache,
    read,
    seen_slots,
    written,
)
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.layers import AttentionFn, Embedding, LayerInputs, Linear, Routing, make_norm
from jaxft.models.module import Params, merge, split, stack
from jaxft.models.per_layer import PerLayerInputs, made_again
from jaxft.models.rope import document_lengths, rotary_tables, unturned
from jaxft.models.scan import Shared, in_turn, joined, of_layers, rematerialised
from jaxft.models.weights import Noise, dropout_from
from jaxft.sharding.cores import on_one_cpu
from jaxft.sharding.cores import product as product_by_cores
from jaxft.sharding.rules import constrain

# Builds one layer of a family.
Block = Callable[[DecoderConfig, Numerics, nnx.Rngs], nnx.Module]


class LayerIndex(NamedTuple):
    """The place in the model of the layers of a part, `[P]`.

    Attributes:
      kinds: int32, index of each one's kind.
      numbers: int32, number of each one, from 0.
    """

    kinds: Any
    numbers: Any


class Decoder(nnx.Module):
    """The body that families share.

    Layers whose parameters have the same shapes are stacked: `layers` is one stack, or a list of
    them, in the order of `DecoderConfig.parts`. In training `jax.lax.scan` runs over the groups in
    which they recur.

    Args:
      config: Sizes.
      numerics: Types.
      blocks: Builders of a layer, by the names of `LayerKind.block`.
      rngs: Random keys.
    """

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        *,
        blocks: Mapping[str, Block],
        rngs: nnx.Rngs,
    ):
        self.config, self.numerics = config, numerics
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.embed = Embedding(config.vocab, config.embed, **kwargs)
        self.positions = (
            Embedding(config.max_length, config.embed, axis="positions", **kwargs)
            if config.learned_positions
            else None
        )
        self.embed_norm = make_norm(config, numerics, config.embed) if config.embed_norm else None
        self.per_layer = PerLayerInputs(config, numerics, rngs) if config.per_layer else None
        stacks = [
            stack(
                functools.partial(blocks[config.blocks[part[0]]], config, numerics), len(part), rngs
            )
            for part in config.parts.values()
        ]
        self.layers = stacks[0] if len(stacks) == 1 else nnx.List(stacks)
        self.norm = make_norm(config, numerics, config.embed)
        self.head = (
            None
            if config.tied
            else Linear((config.vocab,), (config.embed,), axes=("vocab", "embed"), **kwargs)
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits; without positions and segments a row is one document."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        return self.logits(self.hidden(tokens, positions, segments)[0])

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        seeds: UInt32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Returns the normalised residual stream that `logits` reads, in the compute dtype.

        Args:
          tokens: Ids.
          positions: Within documents.
          segments: Number of the document, 0 on padding.
          seeds: Of each token, for the dropout of adapters; None for none.

        Returns:
          It, and what the routers of all layers did, `[L, …]`, or None without experts.
        """
        x = self.embedded(tokens, positions)
        layers = split(self.layers)[1]
        own = self._own_inputs(tokens, x, seeds)
        x, routing = self.through(layers, self.index, x, positions, segments, seeds, own)
        return self.norm(x), routing

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of any positions of `hidden`."""
        w = self.head_table.astype(hidden.dtype)
        with self.precision():
            logits = _logits(hidden, w)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if cap := self.config.logit_cap:
            logits = cap * jnp.tanh(logits / cap)
        return constrain(logits, "batch", "seq", "act_vocab")

    @property
    def index(self) -> tuple[LayerIndex, ...]:
        """Kinds and numbers of the layers of each part."""
        return tuple(
            LayerIndex(
                jnp.asarray([self.config.pattern[number] for number in part], jnp.int32),
                jnp.asarray(part, jnp.int32),
            )
            for part in self.config.parts.values()
        )

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The weight that logits are made with, a tied one included."""
        return (self.embed if self.head is None else self.head).table()

    def init_cache(self, rows: int, slots: int) -> Cache:
        """Allocates an empty cache of `slots` tokens for each of some rows."""
        return empty_cache(self.config, rows, slots, self.numerics.compute_dtype)

    def extend(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        real: Bool[Array, "R T"],
        limits: Int[Array, " R"],
        cache: Cache,
        *,
        rows: Int[Array, " R"] | None = None,
        layers: Sequence[Params] = (),
    ) -> tuple[Float[Array, "R T D"], Cache]:
        """Returns what `hidden` does, for tokens of documents whose beginning the cache holds.

        Reads prompts and decodes (T = 1) alike. Layers are not scanned: a scan would copy each
        layer's part of the cache out of a stack and back again, and on a CPU the weights too.

        Args:
          tokens: Ids, one document in a row.
          positions: In the document; a token's keys and values go into the slot of that number.
          real: False on padding, which is not kept; it follows the tokens.
          limits: The length that each document may reach.
          cache: Of any number of rows.
          rows: Where in the cache these rows are; as they stand if absent.
          layers: Parameters of each layer, as far as they are at hand one by one. Others are
            sliced from the stacked ones.
        """
        c = self.config
        slots = cache.slots
        masks = [seen_slots(positions, real, slots, window=k.window) for k in c.kinds]
        scores = c.scores(c.kinds[0])  # only the windows differ, and these are in the masks

        def attention_of(kind: int) -> AttentionFn:
            def attention(
                q: Array, k: Array | None, v: Array | None, layer: Any, sinks: Array | None
            ) -> tuple[Array, Any]:
                if k is None or v is None:
                    k, v = read(layer, rows)
                else:
                    layer, k, v = written(layer, k, v, positions, real, rows)
                return cached_attention(q, k, v, masks[kind], scores=scores, sinks=sinks), layer

            return attention

        lengths = jnp.broadcast_to(limits[:, None], tokens.shape)
        memory = Memory(rows, real, is_new=real[:, 0] & (positions[:, 0] == 0))
        inputs = self._inputs_by_kind(
            positions, lengths, real.astype(jnp.int32), attention_of, memory
        )
        stacks = list(zip(self._graphdefs, self._by_part(split(self.layers)[1]), strict=True))
        place = {
            number: (part, turn)
            for part, numbers in enumerate(c.parts.values())
            for turn, number in enumerate(numbers)
        }
        x, before, kept = self.embedded(tokens, positions), iter(cache.layers), {}
        own, sources = self._own_inputs(tokens, x), c.sources
        with self.precision():
            for number, kind in enumerate(c.pattern):
                part, turn = place[number]
                graphdef, stacked = stacks[part]
                apart = layers[number] if layers else {}
                params = {p: apart[p] if p in apart else w[turn] for p, w in stacked.items()}
                given = inputs(kind)._replace(per_layer=None if own is None else own[:, :, number])
                layer = kept[sources[number]] if number in sources else next(before)
                x, layer, _ = merge(graphdef, params)(x, given, layer)
                if number not in sources:
                    kept[number] = layer
        return self.norm(x), Cache(tuple(kept.values()))

    def embedded(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream that enters the first layer."""
        x = self.embed(tokens, self.numerics.compute_dtype)
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions, x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return constrain(x, "batch", "stream_seq", "act_embed")

    def _own_inputs(
        self, tokens: Array, start: Float[Array, "B T D"], seeds: Array | None = None
    ) -> Float[Array, "B T L P"] | None:
        """Returns what each layer reads of tokens beside the stream that enters the first one."""
        if self.per_layer is None:
            return None
        noise = None if seeds is None else Noise(seeds, jnp.int32(self.config.layers))
        with self.precision(), dropout_from(noise):
            return made_again(self.per_layer, tokens, start, remat=self.numerics.remat)

    def through(
        self,
        layers: Params,
        index: tuple[LayerIndex, ...],
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        seeds: UInt32[Array, "B T"] | None = None,
        own: Float[Array, "B T L P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Returns the residual stream after some layers, and what their routers did.

        Args:
          layers: Parameters of these layers, paths as in `self.layers`, each array with an axis of
            the layers of its part. There are as many of each part of a run.
          index: Kinds and numbers of these layers, for each part.
          x: The residual stream before them.
          positions: Within documents.
          segments: Number of the document, 0 on padding.
          seeds: Of each token, for the dropout of adapters; None for none.
          own: Inputs that layers have of their own; None for none.
        """
        of_kind = _attention_by_kind(self.config, segments, self.numerics.attention)

        def attention_of(kind: Array | int) -> AttentionFn:
            def attention(
                q: Array, k: Array | None, v: Array | None, shared: Any, sinks: Array | None
            ) -> tuple[Array, Any]:
                k, v = shared if k is None else (k, v)
                return of_kind(kind, q, k, v, sinks), (k, v)

            return attention

        lengths = document_lengths(positions, segments)
        inputs = self._inputs_by_kind(positions, lengths, segments, attention_of)
        parts = zip(self._graphdefs, self._by_part(layers), index, strict=True)
        routings: list[Routing] = []
        shared: Shared = {}
        with self.precision():
            for run in self.config.runs:
                steps, scanned = [], []
                for part in run:
                    graphdef, params, of_part = next(parts)
                    steps.append(self._layer(graphdef, part, inputs, seeds))
                    scanned.append((params, of_part, of_layers(own, part)))
                carry = x, self._unmade(run, x)
                (x, made), routing = jax.lax.scan(in_turn(steps, shared), carry, scanned)
                shared, routings = shared | made, routings + routing
        return x, joined(routings)

    def _shares(self, part: range) -> bool:
        """Returns whether layers behind read keys and values of layers of a part."""
        return not set(part).isdisjoint(self.config.sources.values())

    def _unmade(self, run: Sequence[range], x: Float[Array, "B T D"]) -> Shared:
        """Returns zeros in the place of what a run's layers make for others to read."""
        found = {}
        for part in filter(self._shares, run):
            kind = self.config.kinds[self.config.pattern[part[0]]]
            c = self.config.of_kind(kind)
            empty = jnp.zeros((*x.shape[:2], c.kv_heads, c.head_dim), x.dtype)
            empty = constrain(empty, "batch", "seq", "act_kv_heads", "act_head_dim")
            found[kind.block] = empty, empty
        return found

    @property
    def _graphdefs(self) -> list[Any]:
        """Structure of each part's layers."""
        stacks = self.layers if isinstance(self.layers, nnx.List) else [self.layers]
        return [split(one)[0] for one in stacks]

    def _by_part(self, layers: Params) -> list[Params]:
        """Returns the parameters of each part by their paths in a layer."""
        count = len(self.config.parts)
        if count == 1:
            return [layers]
        parts: list[Params] = [{} for _ in range(count)]
        for path, w in layers.items():
            number, _, rest = path.partition(".")
            parts[int(number)][rest] = w
        return parts

    def _inputs_by_kind(
        self,
        positions: Array,
        lengths: Array,
        segments: Array,
        attention_of: Callable[[Any], AttentionFn],
        memory: Memory | None = None,
    ) -> Callable[[Any], LayerInputs]:
        ropes = [
            None if kind.rope is None else rotary_tables(kind.rope, positions, lengths)
            for kind in self.config.kinds
        ]
        if tables := next((rope for rope in ropes if rope is not None), None):
            ropes = [unturned(*tables) if rope is None else rope for rope in ropes]
        growths = [kind.growth and kind.growth.at(positions) for kind in self.config.kinds]
        real = segments > 0
        return lambda kind: LayerInputs(
            rope=_pick(ropes, kind),
            growth=_pick(growths, kind),
            attention=attention_of(kind),
            real=real,
            segments=segments,
            memory=memory,
        )

    def _layer(
        self, graphdef: Any, part: range, inputs: Callable[[Any], LayerInputs], seeds: Array | None
    ) -> Callable:
        """Returns what a layer of a part does in a scan, rematerialised as the settings say."""
        only, shares = self.config.kind_of(part), self._shares(part)
        first = self.config.kinds[self.config.pattern[part[0]]]

        def layer(
            x: Array, read: Any, scanned: tuple[Params, LayerIndex, Array | None]
        ) -> tuple[Array, Any, Routing | None]:
            params, (kind, number), own = scanned
            x = checkpoint_name(x, activations.INPUTS)
            with dropout_from(None if seeds is None else Noise(seeds, number)):
                given = inputs(kind if only is None else only)._replace(per_layer=own)
                x, made, routing = merge(graphdef, params)(x, given, read)
            return x, made if shares else None, routing

        run = rematerialised(layer, self.numerics)

        def step(x: Array, shared: Shared, scanned: Any) -> tuple[Array, Shared, Routing | None]:
            x, made, routing = run(x, shared.get(first.reads), scanned)
            return x, shared | {first.block: made} if shares else shared, routing

        return step

    def precision(self) -> contextlib.AbstractContextManager:
        """Asks for whole products of float32, which accelerators round to fewer bits by default."""
        exact = self.numerics.compute_dtype == jnp.float32
        return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def _attention_by_kind(
    config: DecoderConfig, segments: Int[Array, "B T"], backend: str
) -> Callable[..., Array]:
    """Returns `(kind, q, k, v, sinks) -> output`; a kind may be known at run time alone."""
    length = segments.shape[1]
    windows = [kind.window if kind.window < length else 0 for kind in config.kinds]
    distinct = sorted(set(windows))

    def index(kind: Array | int) -> Array | int:
        found = [distinct.index(window) for window in windows]
        return found[kind] if isinstance(kind, int) else jnp.asarray(found, jnp.int32)[kind]

    plain = config.scores(LayerKind())
    if backend == "xla":
        # The masks alone differ: picking one costs less than a branch for each.
        masks = [row_mask(segments, window=w) for w in distinct]
        return lambda kind, q, k, v, sinks: checkpoint_name(
            row_attention(q, k, v, _pick(masks, index(kind)), scores=plain, sinks=sinks),
            activations.ATTENTION,
        )

    def branch(window: int) -> Callable[..., Array]:
        scores = dataclasses.replace(plain, window=window)
        return lambda q, k, v, sinks: attend(
            q, k, v, segments, backend=backend, scores=scores, sinks=sinks
        )

    branches = [branch(window) for window in distinct]

    def attention(kind: Array | int, *arrays: Any) -> Array:
        chosen = 0 if len(branches) == 1 else index(kind)
        if isinstance(chosen, int):
            return branches[chosen](*arrays)
        return jax.lax.switch(chosen, branches, *arrays)

    return attention


def _pick(options: Sequence[Any], index: Array | int) -> Any:
    """Returns the option of an index that may be known only when the program runs."""
    if isinstance(index, int):
        return options[index]
    if len(options) == 1:
        return options[0]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays)[index], *options)


def _logits(hidden: Float[Array, "B T D"], w: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    if hidden.shape[1] == 1 and on_one_cpu():
        return product_by_cores(hidden[:, 0], w, jnp.float32)[:, None]
    return jnp.einsum("btd,vd->btv", hidden, w, preferred_element_type=jnp.float32)
