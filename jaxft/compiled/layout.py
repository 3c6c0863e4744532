"""The effect of a strategy on a model: where each array lives, its size, what devices exchange.

Nothing is read but config.json and nothing is allocated, so that a laptop shows hundreds of
devices.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from rich.text import Text

from jaxft.compiled.collectives import Total, collectives, summary
from jaxft.config import RunConfig
from jaxft.console import make_table, stdout
from jaxft.errors import ConfigError
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import array_bytes
from jaxft.models.families import Architecture
from jaxft.sharding.rules import Placement, as_names
from jaxft.training.optimizers.placing import owner_of
from jaxft.training.program import Program, build, build_evaluator, make_placement
from jaxft.workdir.source import find_architecture

# An array of this size that every device holds whole is worth a rule that splits it: of the models
# with published weights it is any matrix over all layers, and none of the norms and routers.
GIANT_BYTES = 64 * 2**20

type Spec = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The placement of one array.

    Attributes:
      shape: Shape of the whole array.
      dtype: Name of its type.
      spec: Mesh axes that each dimension is split over; axes of one device are left out.
      bytes: Size of the whole array.
      bytes_per_device: Size of the part that one device holds.
      copies: Number of devices that hold the same part.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: Spec
    bytes: int
    bytes_per_device: int
    copies: int

    @property
    def is_giant(self) -> bool:
        """Whether every one of several devices holds all of a large array."""
        return self.copies > 1 and self.bytes_per_device == self.bytes >= GIANT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter and what belongs to it.

    Attributes:
      path: Dotted name.
      axes: Name of each dimension.
      value: Placement of the parameter.
      gradient: Placement of its gradient when the optimizer reads it; None if it is frozen.
      moments: The optimizer's arrays of the same shape; none if it is frozen.
    """

    path: str
    axes: tuple[str, ...]
    value: Layout
    gradient: Layout | None
    moments: tuple[Layout, ...]

    @property
    def layouts(self) -> dict[str, Layout]:
        """The parameter by the name "parameter", and of the rest what lies elsewhere than it."""
        found = {"parameter": self.value}
        if self.gradient is not None and self.gradient.spec != self.value.spec:
            found["gradient"] = self.gradient
        if self.moments and self.moments[0].spec != self.value.spec:
            found["optimizer"] = self.moments[0]
        return found

    @property
    def is_giant(self) -> bool:
        """Whether any of its arrays is held whole by every device, and large."""
        return any(layout.is_giant for layout in self.layouts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """The compiled training step's memory and exchanges, per device.

    Attributes:
      totals: Collectives of one step by kind and mesh axes.
      argument_bytes: Bytes of state and batch.
      temporary_bytes: Bytes of all that lives only during the step.
      platform: Platform whose compiler it was.
    """

    totals: tuple[Total, ...]
    argument_bytes: int
    temporary_bytes: int
    platform: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The placement of all of a run's state.

    Attributes:
      model: Path or name of the model.
      strategy: The strategy's name.
      mesh: Devices along each axis.
      devices: Numbers of the devices in the mesh's order.
      parameters: Parameters in the model's order.
      counters: Bytes of optimizer state that belongs to no parameter; every device holds them.
      communication: Exchanges, if the step was compiled.
    """

    model: str
    strategy: str
    mesh: dict[str, int]
    devices: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    counters: int
    communication: Communication | None = None

    @property
    def bytes_per_device(self) -> dict[str, int]:
        """Bytes of parameters, gradients and optimizer state on one device."""
        gradients = [p.gradient for p in self.parameters if p.gradient is not None]
        moments = [moment for p in self.parameters for moment in p.moments]
        return {
            "parameters": sum(p.value.bytes_per_device for p in self.parameters),
            "gradients": sum(layout.bytes_per_device for layout in gradients),
            "optimizer": sum(layout.bytes_per_device for layout in moments) + self.counters,
        }

    @property
    def count(self) -> int:
        """Number of parameters; a tied table counts once."""
        return sum(math.prod(p.value.shape) for p in self.parameters)

    @property
    def giants(self) -> tuple[Parameter, ...]:
        """Parameters of which a large array is whole on every device."""
        return tuple(p for p in self.parameters if p.is_giant)


def cpu_devices(count: int) -> Sequence[Any]:
    """Returns CPU devices that need no hardware; call it before anything else uses jax.

    Raises:
      ConfigError: If there cannot be so many.
    """
    if count < 1:
        raise ConfigError(f"--devices is {count}; expected at least 1.")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # jax runs already, in a notebook or a test: with what it has
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--devices is {count}, but jax has started with {len(devices)} CPU devices, and their "
            "number cannot change any more. Start a new process."
        )
    return devices[:count]


def describe_run(
    config: RunConfig, *, devices: Sequence[Any] | None = None, compiled: bool = False
) -> Description:
    """Describes a run from its config and the model's config.json.

    Rows that `model.add_tokens` would add to the embedding are not counted: no tokenizer is read.

    Args:
      config: The run's.
      devices: That the mesh is made of; all of this machine by default.
      compiled: Whether the training step is compiled for them, which may take a minute.

    Raises:
      ModelError: If there is no such model, or it is not supported.
      ConfigError: If the mesh does not fit the devices, or the strategy the model or its rows: as
        a training run would be refused.
    """
    placement = make_placement(config, devices)
    architecture = find_architecture(config)
    if (
        devices is not None
        and not compiled
        and config.model.attention in ("splash", "cudnn", "tokamax")
    ):
        # Made-up devices have no kernels; where arrays live is the same with others.
        config = with_any_attention(config)
    program = make_program(config, architecture, placement=placement)
    description = describe(program, model=config.model.path)
    if not compiled:
        return description
    return dataclasses.replace(description, communication=compile_step(program))


def with_any_attention(config: RunConfig) -> RunConfig:
    """Returns a config whose attention is available on made-up devices."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))


def make_program(config: RunConfig, architecture: Architecture, *, placement: Placement) -> Program:
    """Builds what the trainer would run, without memory and without data.

    Raises:
      ConfigError: If the run could not start, such as for rows that cannot be split.
    """
    evaluator = build_evaluator(config, architecture, max_segments=1, placement=placement)
    # How many steps an epoch has is not known here; a warmup is taken to end within the run.
    steps = config.train.steps or max(1, config.optim.warmup_steps)
    return build(config, evaluator, steps=steps)


def describe(program: Program, *, model: str) -> Description:
    """Returns where a program's parameters, gradients and optimizer state live.

    Args:
      program: From `build`.
      model: Its path or name, for the reader.
    """
    evaluator, state = program.evaluator, program.state
    abstract, placement = evaluator.abstract, evaluator.placement
    owned, counters = _by_parameter(state.opt_state, abstract.params)
    # Sums over micro-batches are float32, whatever the parameters are.
    summed = _as_float32 if program.batch.tokens.shape[0] > 1 else lambda spec: spec
    mesh = placement.mesh
    return Description(
        model=model,
        strategy=placement.name,
        mesh=dict(mesh.shape),
        devices=tuple(device.id for device in mesh.devices.flat),
        parameters=tuple(
            Parameter(
                path=path,
                axes=abstract.axes[path],
                value=_layout(spec, evaluator.shardings[path]),
                gradient=_layout(summed(spec), program.gradients[path])
                if path in program.gradients
                else None,
                moments=tuple(_layout(leaf, leaf.sharding) for leaf in owned.get(path, ())),
            )
            for path, spec in abstract.params.items()
        ),
        counters=sum(array_bytes(leaf.shape, leaf.dtype) for leaf in counters),
    )


def compile_step(program: Program) -> Communication:
    """Compiles the trainer's own step for the program's devices and reads what it does."""
    mesh = program.evaluator.placement.mesh
    compiled = program.compile()
    memory = compiled.memory_analysis()
    return Communication(
        totals=tuple(summary(collectives(compiled.as_text(), mesh))),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        platform=mesh.devices.flat[0].platform,
    )


def _as_float32(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, jnp.float32)


def _by_parameter(
    state: Any, params: dict[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, list[Any]], list[Any]]:
    """Returns the optimizer's arrays of each parameter, and those of none."""
    owned: dict[str, list[Any]] = {}
    others = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = owner_of(path, params)
        (owned.setdefault(owner, []) if owner else others).append(leaf)
    return owned, others


def _layout(spec: Any, sharding: jax.sharding.NamedSharding) -> Layout:
    entries = (*sharding.spec, *(None,) * (len(spec.shape) - len(sharding.spec)))
    axes = tuple(
        tuple(name for name in as_names(entry) if sharding.mesh.shape[name] > 1)
        for entry in entries
    )
    parts = math.prod(sharding.mesh.shape[name] for names in axes for name in names)
    return Layout(
        shape=tuple(spec.shape),
        dtype=np.dtype(spec.dtype).name,
        spec=axes,
        bytes=array_bytes(spec.shape, spec.dtype),
        bytes_per_device=array_bytes(sharding.shard_shape(spec.shape), spec.dtype),
        copies=sharding.mesh.size // parts,
    )


def format_spec(spec: Spec) -> str:
    """Returns `(-, tensor, fsdp+context)`: mesh axes by dimension, `-` where it is whole."""
    return f"({', '.join('+'.join(names) or '-' for names in spec)})"


def print_description(found: Description) -> None:
    """Prints every array, what a device holds in all, and what devices exchange."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    stdout.print(
        f"{found.model}: {found.count:,} parameters under {found.strategy} on {mesh}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = make_table(["parameter", "shape", "dtype", "split over", "a device", "copies"], left=4)
    for parameter in found.parameters:
        for name, layout in parameter.layouts.items():
            _add_layout(table, parameter.path if name == "parameter" else f"  {name}", layout)
    stdout.print(table)
    stdout.print(_totals(found), highlight=False, soft_wrap=True)
    if found.communication is not None:
        _print_communication(found.communication)


def _add_layout(table: Table, name: str, layout: Layout) -> None:
    table.add_row(
        Text(name),
        "x".join(map(str, layout.shape)) or "scalar",
        layout.dtype,
        format_spec(layout.spec),
        format_bytes(layout.bytes_per_device),
        str(layout.copies),
        style="red" if layout.is_giant else None,
    )


def _totals(found: Description) -> str:
    parts = found.bytes_per_device
    text = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    lines = [f"Each device holds: {text}; {format_bytes(sum(parts.values()))} in all."]
    if found.giants:
        lines.append(
            f"[red]Whole on every device, {format_bytes(GIANT_BYTES)} or more: "
            f"{', '.join(parameter.path for parameter in found.giants)}.[/red]"
        )
    return "\n".join(lines)


def _print_communication(found: Communication) -> None:
    columns = ["collective", "mesh axes", "count", "payload", "sent in rings"]
    table = make_table(columns, left=2)
    for total in found.totals:
        table.add_row(
            total.kind,
            ", ".join(total.axes),
            f"{total.count:,}" if total.exact else f"at least {total.count:,}",
            format_bytes(total.bytes),
            format_bytes(total.wire_bytes),
        )
    stdout.print()
    stdout.print(table)
    stdout.print(
        f"[dim]Of one training step, per device, as the compiler for {found.platform} wrote it; "
        "others may choose other collectives. Besides: arguments "
        f"{format_bytes(found.argument_bytes)}, temporaries "
        f"{format_bytes(found.temporary_bytes)}.[/dim]",
        highlight=False,
        soft_wrap=True,
    )


def check_outputs(**files: str) -> None:
    """Refuses what could not be written, before the work is done.

    Args:
      **files: Path by the flag's name; an empty one is not wanted.

    Raises:
      ConfigError: If a folder is missing or read-only, the path is a folder, or two are the same
        file; all at once.
    """
    problems = []
    paths = [Path(file).resolve() for file in files.values() if file]
    if len(set(paths)) < len(paths):
        flags = ", ".join(f"--{flag}={file}" for flag, file in files.items() if file)
        problems.append(f"{flags}: one would replace the other. Name a file for each.")
    for flag, file in files.items():
        folder = Path(file).absolute().parent
        if not file:
            continue
        if Path(file).is_dir():
            problems.append(f"--{flag}={file} is a folder; name a file.")
        elif not folder.is_dir():
            problems.append(f"--{flag}={file}: there is no folder {folder}. Create it first.")
        elif not os.access(folder, os.W_OK):
            problems.append(f"--{flag}={file}: {folder} cannot be written to. Name another folder.")
    if problems:
        raise ConfigError(problems)


def record(found: Description) -> dict[str, Any]:
    """Returns the description for JSON."""
    return dataclasses.asdict(found) | {"bytes_per_device": found.bytes_per_device}
