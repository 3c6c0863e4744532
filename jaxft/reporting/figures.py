"""Knows by name how each figure that a run recorded is called and written.

`FIGURES` knows the figures of jaxft. Others, of an objective of the user's own, are shown under
their name.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from jaxft.reporting.charts import Unit
from jaxft.training.objectives.recorded import RECORDED

Record = dict[str, Any]

PRIMARY = "validation"
_GIB = 2**30
# Formats of values in a terminal, by unit.
_DIGITS: dict[Unit, str] = {"percent": ".1%", "count": ",.0f", "rate": ".3e", "number": ".4f"}


@dataclass(frozen=True, slots=True)
class Figure:
    """The looks of a figure.

    Attributes:
      title: The name for readers, above the chart and in tables.
      unit: The way in which values are written.
      group: Name in `GROUPS` of the chart that it shares; empty for a chart of its own.
      note: The words beside the title.
      better: Whether high or low values are better; empty if neither.
      course: The value in a record: "objective" for a mean over its steps that varies much, "mean"
        for one that does not, "last" for the value of its last step, "table" for what is not drawn.
      legend: The name among the lines of a shared chart; empty for the title.
      color: Number of its colour in a shared chart.
      from_zero: Whether the axis of values begins at 0.
      scale: The divisor of values.
      digits: The format of values in a terminal; empty for that of the unit.
    """

    title: str
    unit: Unit = "number"
    group: str = ""
    note: str = ""
    better: Literal["", "high", "low"] = ""
    course: Literal["objective", "mean", "last", "table"] = "objective"
    legend: str = ""
    color: int = 0
    from_zero: bool = False
    scale: float = 1.0
    digits: str = ""

    @property
    def form(self) -> str:
        """The template of a value in a terminal, where the next digit may tell two runs apart."""
        return f"{{:{self.digits or _DIGITS[self.unit]}}}"


# In the order of charts and tables. Colours 0 and 1 are training and validation all over the page.
FIGURES = {
    "loss": Figure("Loss", better="low"),
    "perplexity": Figure("Perplexity", better="low", course="table", digits=".4g"),
    "bits_per_byte": Figure("Bits per byte of text", better="low", course="table"),
    "token_accuracy": Figure("Token accuracy", "percent", note="share", better="high"),
    "label_accuracy": Figure("Label accuracy", "percent", note="share", better="high"),
    "exact_match": Figure("Exact match", "percent", note="share", better="high"),
    "accuracy": Figure("Accuracy", "percent", note="share", better="high"),
    "likelihood_accuracy": Figure(
        "Preferred answers that are likelier",
        "percent",
        note="share of pairs, per token, whatever the reference says",
        better="high",
    ),
    "margin": Figure("Margin", note="chosen reward less rejected reward", better="high"),
    "chosen_reward": Figure("Chosen reward", group="rewards", legend="chosen", color=2),
    "rejected_reward": Figure("Rejected reward", group="rewards", legend="rejected", color=5),
    "chosen_log_prob": Figure(
        "Chosen log-probability", group="log_probs", legend="chosen", color=2
    ),
    "rejected_log_prob": Figure(
        "Rejected log-probability", group="log_probs", legend="rejected", color=5
    ),
    "kl": Figure("KL divergence", note="from the reference model, nats"),
    "learning_rate": Figure("Learning rate", "rate", course="last", from_zero=True),
    "grad_norm": Figure("Gradient norm", note="before clipping", course="last"),
    "tokens_per_second": Figure(
        "Throughput", "count", note="tokens per second", course="mean", from_zero=True
    ),
    "mfu": Figure(
        "MFU", "percent", group="mfu", course="mean", legend="causal attention counted once"
    ),
    "mfu_full": Figure(
        "MFU in full", "percent", group="mfu", course="mean", legend="counted in full", color=3
    ),
    "device_memory_peak": Figure(
        "Memory of the device", group="memory", course="last", legend="device, peak", scale=_GIB
    ),
    "host_memory": Figure(
        "Memory of the host", group="memory", course="last", legend="host", color=3, scale=_GIB
    ),
    "expert_balance": Figure(
        "Balance of experts",
        note="load-balancing loss; experts of a token if even",
        course="mean",
        better="low",
    ),
    "expert_busiest": Figure(
        "Busiest expert", note="load of the busiest over the mean", course="mean", better="low"
    ),
    "expert_unused": Figure("Unused experts", "percent", group="experts", legend="unused experts"),
    "expert_dropped": Figure(
        "Dropped tokens", "percent", group="experts", legend="dropped tokens", color=3
    ),
}
# What belongs to a record and is no figure of it.
_BOOKKEEPING = RECORDED - FIGURES.keys()


# What a loss is a mean over, and what its accuracy is, by the units of its objective.
_UNITS = {"documents": "trained tokens", "pairs": "pairs", "labelled": "answers"}
_RIGHT = {"pairs": "Preferred answers ranked first", "labelled": "Answers judged as labelled"}


def unit_words(units: str) -> str:
    """Returns in words what a loss is a mean over."""
    return _UNITS.get(units, "units")


def loss_unit(units: str, *, is_sft: bool) -> str:
    """Returns the words that tell what the loss is a mean over."""
    return "nats per token" if is_sft else f"per {unit_words(units).split()[-1].removesuffix('s')}"


def figure_of(name: str, units: str) -> Figure:
    """Returns how a figure of an objective is told that takes such units of data."""
    figure = FIGURES.get(name, Figure(name))
    if name == "accuracy" and units in _RIGHT:
        note = f"share of {unit_words(units)}"
        return dataclasses.replace(figure, title=_RIGHT[units], note=note)
    return figure


def words_of(name: str, units: str) -> str:
    """Returns what a figure is called within a sentence."""
    title = figure_of(name, units).title
    is_word = name != title and not title[:2].isupper()
    return title[0].lower() + title[1:] if is_word else title


@dataclass(frozen=True, slots=True)
class Group:
    """A chart that several figures share.

    Attributes:
      title: The name for readers.
      note: The words beside the title.
      from_zero: Whether the axis of values begins at 0.
    """

    title: str
    note: str
    from_zero: bool = False


GROUPS = {
    "rewards": Group("Rewards", "implicit, means over answers"),
    "log_probs": Group("Log-probabilities", "nats, means over answers"),
    "mfu": Group("MFU", "model FLOP/s of the devices' peak", from_zero=True),
    "memory": Group("Memory", "GiB", from_zero=True),
    "experts": Group("Experts", "share", from_zero=True),
}


@dataclass(frozen=True)
class Run:
    """The records of a run.

    Attributes:
      metrics: Records of training, in their order.
      evaluations: Records of evaluations by data set, the primary one first.
      units: The units of data that the objective takes: "documents", "pairs", "labelled"; empty if
        that is not known.
      is_sft: Whether the loss is the cross entropy of tokens.
    """

    metrics: list[Record]
    evaluations: dict[str, list[Record]]
    units: str = "documents"
    is_sft: bool = True

    @property
    def primary(self) -> tuple[str, list[Record]]:
        """The data set that a run is judged by, and its records."""
        return next(iter(self.evaluations.items()), (PRIMARY, []))

    @property
    def unit(self) -> str:
        """The units that the loss is a mean over, in words."""
        return unit_words(self.units)

    @property
    def loss_unit(self) -> str:
        """The words that tell what the loss is a mean over."""
        return loss_unit(self.units, is_sft=self.is_sft)

    def figure(self, name: str) -> Figure:
        """Returns how a figure of this run is told."""
        figure = figure_of(name, self.units)
        return dataclasses.replace(figure, note=self.loss_unit) if name == "loss" else figure

    def names(self) -> list[str]:
        """Returns the figures that were recorded: those of the table first."""
        found = dict.fromkeys(
            name
            for record in self._records()
            for name, value in record.items()
            if _is_figure(name, value, record)
        )
        return [*(n for n in FIGURES if n in found), *(n for n in found if n not in FIGURES)]

    def _records(self) -> Iterator[Record]:
        yield from self.metrics
        for records in self.evaluations.values():
            yield from records


def _is_figure(name: str, value: Any, record: Record) -> bool:
    if name in _BOOKKEEPING or isinstance(value, bool | str | list):
        return False
    if isinstance(value, dict) and "value" not in value:
        return False
    of, _, end = name.rpartition("_")
    return not (end in ("low", "high") and of in record)


def value_of(record: Record, name: str) -> float:
    """Returns a figure of a record; nan if it has none, or one that is not finite."""
    figure = record.get(name)
    value = figure.get("value") if isinstance(figure, dict) else figure
    return value if is_finite(value) else math.nan


def interval_of(record: Record, name: str) -> tuple[float, float] | None:
    """Returns both ends of a figure's interval, if the record has them."""
    figure = record.get(name)
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    if isinstance(figure, dict):
        low, high = figure.get("low"), figure.get("high")
    return (low, high) if is_finite(low) and is_finite(high) else None


def is_finite(value: Any) -> TypeGuard[int | float]:
    """Tells whether a value of a record is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
