"""Keys whose text has a form of its own."""

import re

from jaxft.errors import ConfigError

_YES = re.compile(r"\s*(true|yes|on)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"\s*-?\d*\.?\d+\s*")
PERCENTAGE = re.compile(r"\s*(?P<number>-?\d*\.?\d+)\s*%\s*(?P<rest>[:,].*)?", re.DOTALL)


def held_out_share(text: str) -> float:
    """Returns the share of the training data that `data.validation` such as '5%' holds out, or 0.

    Raises:
      ConfigError: If it is a percentage that leaves nothing on either side, or if it is a
        number, or has options.
    """
    if _YES.fullmatch(text) or _NUMBER.fullmatch(text):
        share = 0.1 if _YES.fullmatch(text) else float(text)
        percent = f"{100 * share if share < 1 else share:g}%" if share > 0 else "10%"
        raise ConfigError(
            f"data.validation is {text!r}; expected files, a hub data set or a percentage. For a "
            f"part of the training data write --config.data.validation={percent}, for a file of "
            f"that name ./{text.strip()}."
        )
    match = PERCENTAGE.fullmatch(text)
    if match is None:
        return 0.0
    if match["rest"]:
        raise ConfigError(
            f"data.validation is {text!r}; a percentage stands alone, without {match['rest']!r}. "
            "Limits and weights of the training data are written in data.train."
        )
    share = float(match["number"]) / 100
    if not 0 < share < 1:
        raise ConfigError(
            f"data.validation is {text!r}; expected more than 0% and less than 100% of the "
            "training data."
        )
    return share


_RESERVED_NAMES = {"validation": "data.validation", "retention": "eval.retention"}
"""Names of held-out sets that have a key of their own."""


def data_sets(text: str) -> dict[str, str]:
    """Reads `eval.datasets`: sources by name.

    Raises:
      ConfigError: For what is not of the form 'name=source;…', and names that are taken.
    """
    sources: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, source = (piece.strip() for piece in part.partition("="))
        if not (name and source):
            raise ConfigError(
                f"eval.datasets has {part!r}; expected 'name=source', several separated by ';'."
            )
        if name in _RESERVED_NAMES:
            raise ConfigError(
                f"eval.datasets has {part!r}, but {name!r} is the name of {_RESERVED_NAMES[name]}: "
                f"set --config.{_RESERVED_NAMES[name]}={source}, or give the set another name."
            )
        if name in sources:
            raise ConfigError(
                f"eval.datasets uses the name {name!r} twice, for {sources[name]!r} and for "
                f"{source!r}; give each set a name of its own."
            )
        sources[name] = source
    return sources


def compiler_options(text: str) -> dict[str, str | bool]:
    """Reads `train.compiler_options`.

    Raises:
      ConfigError: For what is not of the form name=value.
    """
    options: dict[str, str | bool] = {}
    for part in text.split(",") if text else []:
        name, equals, value = part.strip().removeprefix("--").partition("=")
        if not (name and equals and value) or " " in value:
            raise ConfigError(
                f"train.compiler_options has {part!r}; expected 'xla_name=value', comma-separated."
            )
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def numbers_by_pattern(key: str, text: str) -> dict[str, float]:
    """Reads keys such as 'attn=16,mlp=8': numbers by regular expression, in their order.

    Raises:
      ConfigError: For what is not of this form.
    """
    found: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        pattern, _, number = part.rpartition("=")
        if not pattern or not re.fullmatch(r"\d+(\.\d+)?([eE]-?\d+)?", number):
            raise ConfigError(f"{key} has {part!r}; expected 'pattern=number', comma-separated.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{key}: {pattern!r} is not a regular expression: {error}."
            ) from error
        if pattern in found:
            raise ConfigError(f"{key} has the pattern {pattern!r} twice; leave one of them out.")
        found[pattern] = float(number)
    return found
