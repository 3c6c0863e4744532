"""Keys of a description: how one is declared, listed and checked."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxft.errors import nearest


def key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declares one configuration key: its default, its meaning and what values it may take."""
    return field(
        default=default,
        metadata={"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum},
    )


@dataclass(frozen=True, slots=True)
class Item:
    """One leaf of a config: where it is, what it holds and what is known about it."""

    path: str
    value: Any
    default: Any
    type: type
    meaning: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None

    @property
    def is_typed(self) -> bool:
        """Whether the value has the key's type; a whole number serves as a number."""
        return type(self.value) is self.type or (type(self.value) is int and self.type is float)

    @property
    def expected(self) -> str:
        """The type in words."""
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return names[self.type]

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the value."""
        if not self.is_typed:
            yield f"{self.path} is {self.value!r}; expected {self.expected}."
            return
        if self.type is float and not math.isfinite(self.value):
            yield f"{self.path} is {self.value}; expected a finite number."
            return
        if self.choices and self.value not in self.choices:
            choices = ", ".join(choice or "''" for choice in self.choices)
            yield (
                f"{self.path} is {self.value!r}; expected one of {choices}."
                f"{nearest(str(self.value), self.choices)}"
            )
        if self.minimum is not None and not self.value >= self.minimum:
            yield f"{self.path} is {self.value}; expected at least {self.minimum}."
        if self.maximum is not None and not self.value <= self.maximum:
            yield f"{self.path} is {self.value}; expected at most {self.maximum}."


def walk(config: Any, prefix: str = "") -> Iterator[Item]:
    """Yields the leaves of a config dataclass in order of declaration."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{path}.")
        else:
            yield Item(path, value, item.default, item.type, **item.metadata)  # pyright: ignore
    for name, group in getattr(config, "groups", {}).items():
        yield from walk(group, f"{prefix}{name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns `{dotted path: value}`, the form in which a workdir and a checkpoint keep it."""
    return {item.path: item.value for item in walk(config)}
