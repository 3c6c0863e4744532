"""Renders pages from templates/: each is one file that needs no network, light and dark.

Python gives values, templates alone give HTML: jinja escapes every value, none is marked as safe.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from jaxft.config import Item, RunConfig, walk
from jaxft.errors import ConfigError


def render(template: str, **values: Any) -> str:
    """Returns a page.

    Args:
      template: Name of a file in templates/.
      values: All that it names; a name without a value is an error.
    """
    return environment().get_template(template).render(values)


@functools.cache
def environment() -> jinja2.Environment:
    """Returns what finds and compiles the templates, each once."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxft.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    found.filters |= {"css": _css, "thousands": "{:,}".format}
    return found


def _css(value: float) -> str:
    """Returns a number as a style or a picture takes it."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, slots=True)
class Tile:
    """A box with one figure, large.

    Attributes:
      title: Name of the figure.
      value: The figure with its unit.
      note: A line below it.
      lead: Whether the box stands out.
      bad: Whether the figure is alarming.
    """

    title: str
    value: str
    note: str
    lead: bool = False
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a configuration.

    Attributes:
      path: The dotted name.
      value: The value as text.
      default: The default as text; empty for a key that is not known.
      meaning: The purpose of the key; empty for a key that is not known.
      changed: Whether value and default differ.
    """

    path: str
    value: str
    default: str
    meaning: str
    changed: bool


def keys_of(settings: Mapping[str, Any]) -> list[Key]:
    """Describes the keys of a run's configuration, in their order."""
    known = {item.path: item for item in _known_keys(str(settings.get("objective.name") or ""))}
    found = []
    for path, value in settings.items():
        item = known.get(path)
        default = item.default if item else None
        found.append(
            Key(
                path=path,
                value=_literal(value),
                default=_literal(default),
                meaning=item.meaning if item else "",
                changed=value != default,
            )
        )
    return found


def _known_keys(objective: str) -> list[Item]:
    """Returns all keys, with those of an objective that this installation has."""
    config = RunConfig()
    try:
        if objective:
            config.objective.name = objective
        return list(walk(config))
    except ConfigError:
        return list(walk(RunConfig()))


def _literal(value: Any) -> str:
    return "" if value is None else str(value)


def short_name(path: str) -> str:
    """Shortens local paths to their last part; hub ids and lists keep theirs."""
    return path.rstrip("/").rsplit("/", 1)[-1] if path.count("/") > 1 else path
