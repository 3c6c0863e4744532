"""Refusals of a strategy, before anything is traced: of a model, its rows and its batches."""

import itertools
from collections.abc import Sequence

from jaxft.config import RunConfig
from jaxft.errors import ConfigError, collected
from jaxft.formatting import counted
from jaxft.hardware.chips import Chip
from jaxft.models.config import DecoderConfig, DeltaConfig
from jaxft.models.experts import check_experts
from jaxft.models.families import Architecture
from jaxft.models.module import AbstractModel
from jaxft.models.row_split import head_shares
from jaxft.sharding.reduce import plan_weight
from jaxft.sharding.rules import Placement
from jaxft.sharding.scaled import FORMATS, rate


def check_length(config: RunConfig, architecture: Architecture) -> None:
    """Raises ConfigError for rows beyond the positions that the model has a table of."""
    context = architecture.config.max_length
    if architecture.config.learned_positions and config.data.max_length > context:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the model has a table of {context} "
            f"positions and knows none beyond. Set --config.data.max_length={context} or less."
        )


def check_matmul(config: RunConfig, chip: Chip | None) -> None:
    """Raises ConfigError for products of 8-bit numbers that a chip does not make any faster.

    Devices of which no rates are known, such as CPUs, compute whatever they are asked to.
    """
    kind = config.model.matmul
    if not kind or chip is None or not chip.bfloat16 or rate(kind, chip) > chip.bfloat16:
        return
    others = [other for other in FORMATS if rate(other, chip) > chip.bfloat16]
    instead = f" or set --config.model.matmul={others[0]}" if others else ""
    raise ConfigError(
        f"model.matmul is {kind!r}, which {chip.name} is not known to multiply faster than "
        f"bfloat16: rounding would gain nothing. Leave the key out{instead}."
    )


def check_strategy(config: RunConfig, architecture: Architecture, placement: Placement) -> None:
    """Raises what the strategy cannot do with this model or these rows, before anything is traced.

    What does not divide among the parameters is found when they are placed.
    """
    model, length = architecture.config, config.data.max_length
    problems: list[str] = []
    with collected(problems):
        placement.slots(length)
    with collected(problems):
        placement.spec(("stream_seq",), (length,), "rows of data.max_length")
    if model.experts is not None:
        with collected(problems):
            check_experts(placement, capacity=config.model.expert_capacity)
    if model.experts is None and placement.split("experts"):
        problems.append(
            f"strategy {placement.name!r} splits experts over {placement.parts('experts')} devices "
            "and the model has none. Use a strategy without experts, such as fsdp."
        )
    if model.delta is not None:
        with collected(problems):
            check_recurrence(model.delta, placement)
    if placement.split("layers"):
        with collected(problems):
            check_stages(model, placement)
    if problems:
        raise ConfigError(problems)


def check_stages(model: DecoderConfig, placement: Placement) -> None:
    """Raises ConfigError if stages, over which layers are split, cannot have the same blocks."""
    axis, *more = placement.split("layers")
    stages = placement.parts("layers")
    if more:
        raise ConfigError(
            f"strategy {placement.name!r} splits layers over {axis}, {', '.join(more)}; stages of "
            "a pipeline lie along one mesh axis."
        )
    if model.sources or model.per_layer:
        read = "keys and values of layers before them" if model.sources else "inputs of their own"
        raise ConfigError(
            f"strategy {placement.name!r} splits layers over {stages} stages, between which the "
            f"residual stream alone travels, and layers of this model read {read} too. Use a "
            "strategy without stages, such as fsdp_tp."
        )
    group, *others = model.runs
    turns = 1 if others else len(group[0])
    if turns % stages == 0:
        return
    if turns == 1 and model.layers > 1:
        layers = counted(model.layers, "layer")
        found = (
            f"the blocks of this model's {layers} do not recur in equal groups "
            f"({_spans(model.blocks)})"
        )
        advice = "Use"
    else:
        groups = f"{turns} groups of {len(group)} layers"
        found = f"this model has {counted(turns, 'layer') if len(group) == 1 else groups}"
        advice = f"Use a mesh whose {axis} divides {turns}, or"
    raise ConfigError(
        f"strategy {placement.name!r} splits layers over {stages} stages, which must have equal "
        f"layers, and {found}. {advice} a strategy without stages, such as fsdp_tp."
    )


def _spans(blocks: Sequence[str]) -> str:
    """Says which layers have which block, as far as the first four that differ."""
    said, first = [], 0
    for block, same in itertools.groupby(blocks):
        last = first + len(list(same)) - 1
        layers = f"layers {first} to {last}" if last > first else f"layer {first}"
        said.append(f"{layers} {block}")
        first = last + 1
    return ", ".join(said[:4] + ["…"] * (len(said) > 4))


def check_recurrence(sizes: DeltaConfig, placement: Placement) -> None:
    """Raises ConfigError if devices that share a row cannot share its recurrent heads instead."""
    heads, shares = sizes.value_heads, head_shares(placement, "act_heads", sizes.value_heads)
    if placement.split("seq") and heads % shares:
        raise ConfigError(
            f"strategy {placement.name!r} splits rows over {placement.parts('seq')} devices, which "
            f"exchange them for heads in recurrent layers: {heads} heads cannot be shared by "
            f"{shares} devices. Use a mesh with fewer of them, or a strategy that keeps rows whole."
        )


def check_weights(abstract: AbstractModel, placement: Placement, tokens: tuple[int, int]) -> None:
    """Raises what the strategy cannot do with weights and tokens `[B, T]` together."""
    problems: dict[str, None] = {}
    for path, spec in abstract.params.items():
        axes, shape = abstract.axes[path], spec.shape
        if axes[0] == "layers":
            axes, shape = axes[1:], shape[1:]
        found: list[str] = []
        with collected(found), placement.activate():
            plan_weight(axes, shape, tokens)
        problems |= dict.fromkeys(found)
    if problems:
        raise ConfigError(list(problems))


def check_rows(config: RunConfig, placement: Placement) -> int:
    """Returns the rows of a micro-batch.

    Raises:
      ConfigError: If they cannot be split over the mesh.
    """
    train = config.train
    rows = train.batch_size // train.accumulation
    if rows % placement.batch_shards:
        raise ConfigError(
            f"train.batch_size {train.batch_size} in {train.accumulation} micro-batches gives "
            f"{rows} rows, which cannot be split over {placement.batch_shards} devices. Use a "
            f"multiple of {placement.batch_shards * train.accumulation}."
        )
    return rows
