"""The modules that PEFT adapts, and what of our sites each holds.

A module's update of its weight is `scale B A`. Where several of our sites are one module, their
pairs are blocks of its pair: the As lie one under another, and each B has the rows of its site and
the columns of its A.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.hf.rules import Naming, Part, Rule, Tensor, expand

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Names in it are this, the name of a module, and what of the adapter's it has.
PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer, or a parameter of all experts at once, that can have an adapter.

    Attributes:
      tensor: Weight in the model's files, and the parts of it that are our sites'.
      outputs: Rows of its B.
      inputs: Columns of its A.
      experts: Number of pairs `[outputs, r]`, `[r, inputs]` that its tensors hold.
    """

    tensor: Tensor
    outputs: int
    inputs: int
    experts: int

    @property
    def name(self) -> str:
        """Name that patterns and targets of adapter_config.json are compared with."""
        return self.tensor.name.removesuffix(".weight")

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter of a module instead of a module's weight."""
        return not self.tensor.name.endswith(".weight")

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of our sites, in the order of their rows unless these lie in turns."""
        return tuple(site_of(part.rule) for part in self.tensor.parts)

    def rows(self, part: Part) -> slice:
        """Returns the rows of B, and places of magnitudes, that belong to a part."""
        outputs, _ = part.rule.matrix or (0, 0)
        return part.where[outputs]

    def part_a(self, a: np.ndarray) -> np.ndarray:
        """Returns A `[r, *in]` of a site at one index, or PEFT's `[E r, in]`, as `[E, r, in]`."""
        return a.reshape(self.experts, -1, self.inputs)

    def part_b(self, b: np.ndarray) -> np.ndarray:
        """Returns B `[*out, r]` of a site at one index as `[E, out, r]`."""
        return b.reshape(self.experts, -1, b.shape[-1])

    def join(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns a pair `[E, r, in]`, `[E, out, r]` as PEFT has it: `[E r, in]`, `[out, r E]`."""
        return a.reshape(-1, self.inputs), b.transpose(1, 2, 0).reshape(self.outputs, -1)

    def split_b(self, b: np.ndarray) -> np.ndarray:
        """Returns PEFT's `[out, r E]` as `[E, out, r]`."""
        return b.reshape(self.outputs, -1, self.experts).transpose(2, 0, 1)


def site_of(rule: Rule) -> str:
    """Returns the path of the site that owns a weight."""
    return rule.ours.removesuffix(".w")


def module_name(tensor: str) -> str:
    """Returns the name of the module that owns a tensor."""
    return tensor.rpartition(".")[0]


def is_named(name: str, ends: Iterable[str]) -> bool:
    """Returns whether one of these is the name or its end, whole components of it."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def find_modules(
    naming: Naming, rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> list[Module]:
    """Returns all modules that consist of weights of these shapes.

    Args:
      naming: The family's.
      rules: Of it, those that name the modules; tables and what is no weight are passed over.
      shapes: Of all parameters of the model, weights as if they were dense.
    """
    table = [rule for rule in rules if rule.ours.endswith(".w") and rule.matrix]
    paths = {rule.ours for rule in table} - set(naming.tables)
    found = []
    for tensor in expand(table, {path: shapes[path] for path in paths if path in shapes}):
        outputs, inputs = tensor.parts[0].rule.matrix or (0, 1)
        if any((part.rule.split or (outputs, ""))[0] != outputs for part in tensor.parts):
            raise ValueError(f"{tensor.name}: its parts share inputs, so their As are no blocks.")
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
        found.append(Module(tensor, tensor.shape[outputs], tensor.shape[inputs], experts))
    return found


def name_pairs(modules: Iterable[Module], parameters: Iterable[str]) -> dict[str, Module]:
    """Returns `{start of the names of its tensors: module}`.

    Parameters of one module that are adapted themselves are wrapped one around another, so that
    their names depend on which of them are: the first is innermost.

    Args:
      modules: In the order in which their module owns parameters.
      parameters: Ends of names of the parameters that are adapted.
    """
    ends = tuple(parameters)
    wrapped: dict[str, list[Module]] = {}
    named = {}
    for module in modules:
        if not module.is_parameter:
            named[PREFIX + module.name] = module
        elif is_named(module.name, ends):
            wrapped.setdefault(module_name(module.name), []).append(module)
    for owner, inside in wrapped.items():
        for depth, module in enumerate(reversed(inside)):
            named[PREFIX + owner + ".base_layer" * depth] = module
    return named
