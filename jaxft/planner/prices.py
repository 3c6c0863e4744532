"""Prices of chips, from a table that users can replace by their own."""

import math
import tomllib
from dataclasses import dataclass
from datetime import date
from importlib import resources
from pathlib import Path

from jaxft.errors import ConfigError, nearest
from jaxft.hardware.chips import CHIPS


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one chip.

    Attributes:
      per_chip_hour: Price of a chip for an hour, in the table's currency.
      date: Day on which it was looked up.
      source: Place where it is published.
    """

    per_chip_hour: float
    date: str
    source: str


@dataclass(frozen=True, slots=True)
class Prices:
    """A table of prices.

    Attributes:
      currency: Currency of all prices.
      chips: Prices by name of the chip.
    """

    currency: str
    chips: dict[str, Price]

    def of(self, chip: str) -> Price | None:
        """Returns the price of a chip, or None if the table has none."""
        return self.chips.get(chip)


def read_prices(file: str = "") -> Prices:
    """Reads a table of prices, by default the one that comes with jaxft.

    Raises:
      ConfigError: If the file is missing or is no such table; all problems at once.
    """
    name = file or "jaxft/planner/prices.toml"
    try:
        if file:
            text = Path(file).read_text(encoding="utf-8")
        else:
            text = resources.files("jaxft.planner").joinpath("prices.toml").read_text("utf-8")
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"--prices={name} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of TOML, or of its encoding
        raise ConfigError(f"--prices={name} is no TOML: {error}.") from error
    problems, chips = [], {}
    known = [chip.name for chip in CHIPS]
    entries = table.get("chips", {})
    for chip, entry in entries.items() if isinstance(entries, dict) else ():
        if chip not in known:
            problems.append(f"--prices={name}: no chip {chip!r} is known.{nearest(chip, known)}")
            continue
        per_hour = entry.get("per_chip_hour") if isinstance(entry, dict) else None
        number = per_hour if isinstance(per_hour, int | float) else -1
        if isinstance(per_hour, bool) or not 0 <= number < math.inf:
            problems.append(
                f"--prices={name}: chips.{chip}.per_chip_hour is {per_hour!r}; expected a number."
            )
            continue
        looked_up = entry.get("date", "")
        when = looked_up.isoformat() if isinstance(looked_up, date) else str(looked_up)
        chips[chip] = Price(float(number), when, str(entry.get("source", "")))
    if not chips and not problems:
        problems.append(f"--prices={name} has no table [chips.NAME] with per_chip_hour.")
    if problems:
        raise ConfigError(problems)
    return Prices(str(table.get("currency", "USD")), chips)
