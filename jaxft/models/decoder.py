"""A decoder-only transformer: embedding, a scanned stack of one family's blocks, norm and head."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxft.models import activations
from jaxft.models.attention import attend, row_attention, row_mask
from jaxft.models.cache import KVCache, cached_attention, seen_slots, write
from jaxft.models.config import DecoderConfig, LayerKind, Numerics
from jaxft.models.layers import AttentionFn, Embedding, LayerInputs, Linear, Routing, make_norm
from jaxft.models.module import Params, merge, split, stack
from jaxft.models.rope import document_lengths, rotary_tables
from jaxft.models.weights import Noise, dropout_from
from jaxft.sharding.cores import on_one_cpu
from jaxft.sharding.cores import product as product_by_cores
from jaxft.sharding.rules import constrain


class LayerIndex(NamedTuple):
    """The place of layers in the model.

    Attributes:
      kinds: int32 `[L]`, index of each one's kind.
      numbers: int32 `[L]`, number of each one, from 0.
    """

    kinds: Any
    numbers: Any


class Decoder(nnx.Module):
    """The body that families share; `block` builds one layer of the family."""

    def __init__(
        self,
        config: DecoderConfig,
        numerics: Numerics,
        *,
        block: Callable[[DecoderConfig, Numerics, nnx.Rngs], nnx.Module],
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
        self.layers = stack(lambda r: block(config, numerics, r), config.layers, rngs)
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
        x, routing = self.through(layers, self.index, x, positions, segments, seeds)
        return self.norm(x), routing

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns float32 logits of any positions of `hidden`."""
        w = self.head_table.astype(hidden.dtype)
        with self.precision():
            logits = _logits(hidden, w)
        if cap := self.config.logit_cap:
            logits = cap * jnp.tanh(logits / cap)
        return constrain(logits, "batch", "seq", "act_vocab")

    @property
    def index(self) -> LayerIndex:
        """Kind and number of every layer."""
        kinds = jnp.asarray(self.config.pattern, jnp.int32)
        return LayerIndex(kinds, jnp.arange(self.config.layers, dtype=jnp.int32))

    @property
    def head_table(self) -> Float[Array, "V D"]:
        """The weight that logits are made with, a tied one included."""
        return (self.embed if self.head is None else self.head).table()

    def init_cache(self, rows: int, slots: int) -> KVCache:
        """Allocates an empty cache of `slots` tokens for each of some rows."""
        c = self.config
        shape = (rows, c.kv_heads, slots, c.head_dim)
        empty = jnp.zeros(shape, self.numerics.compute_dtype)
        return KVCache((empty,) * c.layers, (empty,) * c.layers)

    def extend(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        real: Bool[Array, "R T"],
        limits: Int[Array, " R"],
        cache: KVCache,
        *,
        rows: Int[Array, " R"] | None = None,
        layers: Sequence[Params] = (),
    ) -> tuple[Float[Array, "R T D"], KVCache]:
        """Returns what `hidden` does, for tokens of documents whose beginning the cache holds.

        Reads prompts and decodes (T = 1) alike. Layers are not scanned: a scan would copy each
        layer's part of the cache out of a stack and back again, and on a CPU the weights too.

        Args:
          tokens: Ids, one document in a row.
          positions: In the document; a token's keys and values go into the slot of that number.
          real: False on padding, which is not kept.
          limits: The length that each document may reach.
          cache: Of any number of rows.
          rows: Where in the cache these rows are; as they stand if absent.
          layers: Parameters of each layer, as far as they are at hand one by one. Others are
            sliced from the stacked ones.
        """
        c = self.config
        masks = [seen_slots(positions, real, cache.slots, window=k.window) for k in c.kinds]
        scores = c.scores(c.kinds[0])  # only the windows differ, and these are in the masks

        def attention_of(kind: int) -> AttentionFn:
            def attention(q: Array, k: Array, v: Array, layer: Any, sinks: Array | None):
                layer = tuple(
                    write(old, new, positions, real, rows)
                    for old, new in zip(layer, (k, v), strict=True)
                )
                k, v = layer if rows is None else (x[rows] for x in layer)
                return cached_attention(q, k, v, masks[kind], scores=scores, sinks=sinks), layer

            return attention

        lengths = jnp.broadcast_to(limits[:, None], tokens.shape)
        inputs = self._inputs_by_kind(positions, lengths, real, attention_of)
        graphdef, stacked = split(self.layers)
        x, caches = self.embedded(tokens, positions), []
        with self.precision():
            for number, kind in enumerate(c.pattern):
                apart = layers[number] if layers else {}
                params = {p: apart[p] if p in apart else w[number] for p, w in stacked.items()}
                layer = merge(graphdef, params)
                x, kept, _ = layer(x, inputs(kind), (cache.k[number], cache.v[number]))
                caches.append(kept)
        k, v = zip(*caches, strict=True)
        return self.norm(x), KVCache(k, v)

    def embedded(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream that enters the first layer."""
        x = self.embed(tokens, self.numerics.compute_dtype)
        if self.config.embed_scale != 1:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions, x.dtype)
        return constrain(x, "batch", "stream_seq", "act_embed")

    def through(
        self,
        layers: Params,
        index: LayerIndex,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        seeds: UInt32[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """Returns the residual stream after some layers, and what their routers did.

        Args:
          layers: Parameters of these layers, paths as in one layer, each array with an axis L.
          index: Kind and number of each.
          x: The residual stream before them.
          positions: Within documents.
          segments: Number of the document, 0 on padding.
          seeds: Of each token, for the dropout of adapters; None for none.
        """
        of_kind = _attention_by_kind(self.config, segments, self.numerics.attention)

        def attention_of(kind: Array) -> AttentionFn:
            return lambda q, k, v, cache, sinks: (of_kind(kind, q, k, v, sinks), cache)

        inputs = self._inputs_by_kind(
            positions, document_lengths(positions, segments), segments > 0, attention_of
        )
        x, _, routing = self._scan(layers, index, x, inputs, None, seeds)
        return x, routing

    def _inputs_by_kind(
        self,
        positions: Array,
        lengths: Array,
        real: Array,
        attention_of: Callable[[Any], AttentionFn],
    ) -> Callable[[Any], LayerInputs]:
        ropes = [
            None if kind.rope is None else rotary_tables(kind.rope, positions, lengths)
            for kind in self.config.kinds
        ]
        return lambda kind: LayerInputs(_pick(ropes, kind), attention_of(kind), real)

    def _scan(
        self,
        layers: Params,
        index: LayerIndex,
        x: Array,
        inputs: Callable[[Array], LayerInputs],
        caches: Any,
        seeds: Array | None = None,
    ) -> tuple[Array, Any, Routing | None]:
        graphdef, _ = split(self.layers)

        def layer(x: Array, scanned: tuple[Params, Any, LayerIndex]) -> tuple[Array, Any]:
            params, cache, (kind, number) = scanned
            x = checkpoint_name(x, activations.INPUTS)
            with dropout_from(None if seeds is None else Noise(seeds, number)):
                x, cache, routing = merge(graphdef, params)(x, inputs(kind), cache)
            return x, (cache, routing)

        with self.precision():
            remat = _remat(layer, self.numerics)
            x, (caches, routing) = jax.lax.scan(remat, x, (layers, caches, index))
        return x, caches, routing

    def precision(self) -> contextlib.AbstractContextManager:
        """Asks for whole products of float32, which accelerators round to fewer bits by default."""
        exact = self.numerics.compute_dtype == jnp.float32
        return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def _attention_by_kind(
    config: DecoderConfig, segments: Int[Array, "B T"], backend: str
) -> Callable[..., Array]:
    """Returns `(kind, q, k, v, sinks) -> output` of layers whose kind is known at run time."""
    length = segments.shape[1]
    windows = [kind.window if kind.window < length else 0 for kind in config.kinds]
    distinct = sorted(set(windows))
    index = jnp.asarray([distinct.index(window) for window in windows], jnp.int32)
    plain = config.scores(LayerKind())
    if backend == "xla":
        # The masks alone differ: picking one costs less than a branch for each.
        masks = [row_mask(segments, window=w) for w in distinct]
        return lambda kind, q, k, v, sinks: checkpoint_name(
            row_attention(q, k, v, _pick(masks, index[kind]), scores=plain, sinks=sinks),
            activations.ATTENTION,
        )

    def branch(window: int) -> Callable[..., Array]:
        scores = dataclasses.replace(plain, window=window)
        return lambda q, k, v, sinks: attend(
            q, k, v, segments, backend=backend, scores=scores, sinks=sinks
        )

    branches = [branch(window) for window in distinct]
    if len(branches) == 1:
        return lambda kind, *arrays: branches[0](*arrays)
    return lambda kind, *arrays: jax.lax.switch(index[kind], branches, *arrays)


def _pick(options: Sequence[Any], index: Array | int) -> Any:
    """Returns the option of an index that may be known only when the program runs."""
    if isinstance(index, int):
        return options[index]
    if len(options) == 1:
        return options[0]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays)[index], *options)


def _remat(layer: Callable, numerics: Numerics) -> Callable:
    """Wraps a scanned layer so that only what the settings name is kept for its backward pass."""
    policies = jax.checkpoint_policies
    kept = activations.kept(numerics.remat)
    offloaded = activations.offloaded(numerics.remat, numerics.offload)
    if numerics.remat == "none":
        return layer
    if numerics.remat == "dots":
        saved = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(activations.MLP, activations.PRODUCT),
        )
    elif offloaded:
        saved = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(kept - offloaded),
            names_which_can_be_offloaded=sorted(offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        saved = policies.save_only_these_names(*sorted(kept))
    # Inside a scan nothing can merge the two passes, so the costly guard against it is not needed.
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)


def _logits(hidden: Float[Array, "B T D"], w: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    if hidden.shape[1] == 1 and on_one_cpu():
        return product_by_cores(hidden[:, 0], w, jnp.float32)[:, None]
    return jnp.einsum("btd,vd->btv", hidden, w, preferred_element_type=jnp.float32)
