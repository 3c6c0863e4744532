"""How a family's tensors are named and laid out in Hugging Face files: read both ways."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class Rule:
    """Correspondence of one of our parameters with a tensor (or one tensor per layer).

    The methods speak of one tensor: shapes and arrays are without our leading axis of layers.

    Attributes:
      ours: Dotted path of the parameter, such as `layers.attn.q.w`.
      theirs: Tensor name; `{layer}` stands for the index along our leading axis of layers.
      layout: Their axes, an arrow, our axes: `(n h) d -> d n h`. Letters are those of
        `sharding/axes.py`; a group in brackets is one axis of theirs, first letter outermost.
        The leading axis of layers is not written.
    """

    ours: str
    theirs: str
    layout: str
    _groups: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _letters: str = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        theirs, _, ours = self.layout.replace(" ", "").partition("->")
        groups = tuple(
            group or letter for group, letter in re.findall(r"\(([a-z]+)\)|([a-z])", theirs)
        )
        well_formed = re.fullmatch(r"(?:\([a-z]+\)|[a-z])+->[a-z]+", f"{theirs}->{ours}")
        if (
            not well_formed
            or sorted("".join(groups)) != sorted(set(ours))
            or len(set(ours)) < len(ours)
        ):
            raise ValueError(
                f"layout {self.layout!r} of {self.ours}: expected the same letters, once each, on "
                "both sides of '->', with groups in brackets on the left only."
            )
        object.__setattr__(self, "_groups", groups)
        object.__setattr__(self, "_letters", ours)

    @property
    def stacked(self) -> bool:
        """Whether our parameter has a leading axis of layers, each of them a tensor of theirs."""
        return "{layer}" in self.theirs

    def shape_theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of their tensor, given the shape of ours."""
        sizes = dict(zip(self._letters, shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in self._groups)

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns their contiguous tensor seen in our layout.

        It is a view: indexing it touches only the bytes of `tensor` that the index selects, which
        is what makes reading a slice from a memory map cheap.

        Args:
          tensor: Their tensor.
          shape: The shape of ours: it holds the sizes of the letters in a group.
        """
        sizes = dict(zip(self._letters, shape, strict=True))
        written = "".join(self._groups)
        split = tensor.reshape([sizes[letter] for letter in written])
        return split.transpose([written.index(letter) for letter in self._letters])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns our array in their layout, contiguous: the inverse of `to_ours`."""
        written = "".join(self._groups)
        moved = array.transpose([self._letters.index(letter) for letter in written])
        return np.ascontiguousarray(moved).reshape(self.shape_theirs(array.shape))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of theirs and where it lies in our parameters.

    Attributes:
      name: Their name.
      rule: The rule it follows.
      layer: Index along the leading axis of our parameter; None where there is no such axis.
      shape: The shape of ours, without the axis of layers.
    """

    name: str
    rule: Rule
    layer: int | None
    shape: tuple[int, ...]


def expand(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Yields every tensor of theirs that parameters of these shapes consist of.

    Rules for parameters that are absent, such as the head of a tied model, are passed over.

    Raises:
      ValueError: If a parameter has no rule.
    """
    table = {rule.ours: rule for rule in rules}
    if missing := sorted(shapes.keys() - table.keys()):
        raise ValueError(f"No rule says which tensors these parameters are: {', '.join(missing)}.")
    for path, rule in table.items():
        if path not in shapes:
            continue
        shape = shapes[path]
        if not rule.stacked:
            yield Tensor(rule.theirs, rule, None, shape)
            continue
        for layer in range(shape[0]):
            yield Tensor(rule.theirs.replace("{layer}", str(layer)), rule, layer, shape[1:])
