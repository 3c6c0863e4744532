"""The one place that touches Flax NNX beyond `Module`, `Rngs` and `List`.

Everything outside sees a hashable `graphdef` and flat dicts `{dotted path: array}`, which jitted
functions take without a detour through Python objects.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]

# Last parts of the paths of parameters that no gradient changes: they stay as they were loaded.
_UNLEARNT = ("correction", "factor")


class Param(nnx.Param):
    """A weight whose dimensions are named; `axes` are names of `sharding/axes.py`."""

    def __init__(self, value: jax.Array, *, axes: tuple[str, ...]):
        # eager_sharding=False: placement is the strategy's business, never flax's.
        super().__init__(value, axes=axes, eager_sharding=False)


def is_unlearnt(path: str) -> bool:
    """Whether a parameter stays as it was loaded, whatever trains: numbers no gradient changes."""
    return path.rpartition(".")[2] in _UNLEARNT


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """A model without memory.

    Attributes:
      graphdef: Structure.
      params: Shape and dtype of each parameter.
      axes: Names of the dimensions of each.
      stacks: Numbers of the layers in each stack by its path, such as `layers`.
    """

    graphdef: Any
    params: dict[str, jax.ShapeDtypeStruct]
    axes: dict[str, tuple[str, ...]]
    stacks: Mapping[str, range] = field(default_factory=dict)

    def layers_of(self, path: str) -> range:
        """Returns the numbers of the layers that a stacked parameter is of."""
        return next(n for stack, n in self.stacks.items() if path.startswith(f"{stack}."))


def split(module: nnx.Module) -> tuple[Any, Params]:
    """Separates structure from arrays."""
    graphdef, state = nnx.split(module)
    return graphdef, {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def merge(graphdef: Any, params: Mapping[str, jax.Array]) -> Any:
    """Inverse of `split`."""
    nested: dict = {}
    for path, value in params.items():
        # Numbers are places in lists.
        *parents, leaf = (int(name) if name.isdigit() else name for name in path.split("."))
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nnx.merge(graphdef, nested)


def abstract_model(build: Callable[[nnx.Rngs], nnx.Module]) -> AbstractModel:
    """Returns the structure that `build` makes, without allocating any of it."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    flat = {_dotted(path): variable for path, variable in nnx.to_flat_state(state)}
    params = {
        path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, variable in flat.items()
    }
    return AbstractModel(graphdef, params, {p: v.get_metadata()["axes"] for p, v in flat.items()})


def init_params(build: Callable[[nnx.Rngs], nnx.Module], seed: int) -> Params:
    """Returns random parameters; jit it with `out_shardings` to make them where they belong."""
    return split(build(nnx.Rngs(seed)))[1]


def stack(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """Builds `count` equal modules as one whose parameters have a leading axis of layers."""

    def arrays(key: jax.Array) -> Params:
        return split(build(nnx.Rngs(params=key)))[1]

    template = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    module = merge(nnx.graphdef(template), jax.vmap(arrays)(jax.random.split(rngs.params(), count)))
    for _, variable in nnx.to_flat_state(nnx.state(module)):
        variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return module


def apart(params: Params, stacks: Mapping[str, Sequence[int]]) -> tuple[Params, ...]:
    """Returns the parameters of stacked modules one by one, where that takes no memory.

    So it is in the memory of one CPU, whose products take an array as it lies but copy what they
    slice out of a stack. Elsewhere slices are part of products, and there is nothing to return.

    Args:
      params: Of the model.
      stacks: Numbers of the modules in each stack by its path; all numbers from 0 on.

    Returns:
      For each module its parameters by their paths in it.
    """
    found: tuple[Params, ...] = tuple({} for _ in range(sum(map(len, stacks.values()))))
    for path, w in params.items():
        stack = next((name for name in stacks if path.startswith(f"{name}.")), None)
        devices = list(w.devices())
        on_cpu = len(devices) == 1 and devices[0].platform == "cpu" and w.is_fully_addressable
        # jax packs two numbers of four bits into a byte, and numpy does not.
        if stack is None or not on_cpu or w.dtype in (jnp.int4, jnp.uint4):
            continue
        # The array of the shard is new: what looks at its memory does not outlive the views.
        memory = np.asarray(w.addressable_shards[0].data)
        for turn, number in enumerate(stacks[stack]):
            view = jax.device_put(memory[turn], devices[0], may_alias=True)
            found[number][path.removeprefix(f"{stack}.")] = view
    return found if any(found) else ()


def optional(param: Param | None = None) -> Any:
    """Returns what an attribute must hold that is a parameter now or later."""
    return nnx.data(param)


def modules_in(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields the parts of a module with their dotted paths."""
    return ((_dotted(path), part) for path, part in nnx.iter_modules(module))


def cast(module: nnx.Module, dtype: Any, which: Callable[[str], bool]) -> None:
    """Changes the type of the parameters whose path is chosen."""
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if which(_dotted(path)):
            variable.set_value(variable.get_value().astype(dtype))


def without_memory(build: Callable[[nnx.Rngs], nnx.Module]) -> Any:
    """Returns the module that `build` makes, whose parameters are shapes alone."""
    return nnx.eval_shape(lambda: build(nnx.Rngs(0)))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
