"""A description as YAML, which `config_file` reads."""

import re
import textwrap
from typing import Any

from jaxft.config.keys import walk
from jaxft.config.run import RunConfig

_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


def describe(config: RunConfig) -> str:
    """Returns every key with its value and meaning as YAML, which `config_file` reads."""
    lines, group = [], ""
    for item in walk(config):
        parent, _, leaf = item.path.rpartition(".")
        if parent != group:
            lines += ["", f"{parent}:"] if parent else [""]
            group = parent
        indent = "  " if parent else ""
        choices = f" One of: {', '.join(c or "''" for c in item.choices)}." if item.choices else ""
        meaning = textwrap.wrap(item.meaning + choices, 78 - len(indent))
        lines += [f"{indent}# {line}" for line in meaning]
        changed = f"  # default: {yaml_value(item.default)}" if item.value != item.default else ""
        lines.append(f"{indent}{leaf}: {yaml_value(item.value)}{changed}")
    return "\n".join(lines).strip("\n")


def to_yaml(values: dict[str, Any]) -> str:
    """Returns `{dotted path: value}` as YAML, keys of a group together."""
    lines, group = [], ""
    for path, value in values.items():
        parent, _, leaf = path.rpartition(".")
        if parent not in ("", group):
            lines.append(f"{parent}:")
        group = parent
        lines.append(f"{'  ' if parent else ''}{leaf}: {yaml_value(value)}")
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """Returns one value as every version of YAML reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        digits, e, exponent = repr(value).partition("e")
        return f"{digits}{'' if '.' in digits or not e else '.0'}{e}{exponent}"
    if not isinstance(value, str):
        return str(value)
    if re.fullmatch(r"[A-Za-z][\w./+-]*", value) and value.lower() not in _YAML_WORDS:
        return value
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
    return f'"{"".join(plain)}"'
