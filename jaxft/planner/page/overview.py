"""Sums up a plan for a page: a row of the comparison, and tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxft.formatting import format_bytes, format_count, format_seconds
from jaxft.planner.page.parts import fit_words, interval, money, percent
from jaxft.planner.plan import Plan, describe_shape, said_to_train
from jaxft.reporting.pages import Tile


@dataclass(frozen=True, slots=True)
class Estimates:
    """The estimates of a plan, in words; "–" for those that are not known.

    Attributes:
      step: The time of a step.
      interval: The interval of that time; empty if there is none.
      rate: Tokens a second and chip.
      mfu: Model FLOP/s of the chips' peak, causal attention counted once.
      price: The price of a million tokens.
    """

    step: str = "–"
    interval: str = ""
    rate: str = "–"
    mfu: str = "–"
    price: str = "–"


def estimates_of(plan: Plan) -> Estimates:
    """Writes the estimates of a plan."""
    time, speed = plan.time, plan.speed
    if time is None:
        return Estimates()
    step = format_seconds(time.seconds)
    if speed is None:
        return Estimates(step, interval(time))
    return Estimates(
        step=step,
        interval=interval(time),
        rate=f"{speed.tokens_per_second_per_chip:,.0f}",
        mfu=percent(speed.mfu, 1),
        price=money(speed.price_per_million_tokens, speed.currency)
        if speed.price_per_hour
        else "–",
    )


def tiles_of(plan: Plan) -> Iterator[Tile]:
    """Yields whether the plan fits, and its figures."""
    memory, topology = plan.memory, plan.topology
    verdict, _, margin = fit_words(plan).partition(", ")
    of = f" of {format_bytes(memory.limit)}" if memory.limit else ""
    source = ", an estimate" if plan.source != "compiled" else ""
    note = f"{margin}: " if margin else ""
    note += f"{format_bytes(memory.used)}{of}{source}"
    yield Tile("Memory", verdict.capitalize(), note, lead=True, bad=not plan.fits)
    yield from _speed_tiles(plan)
    count = f"{plan.parameters:,}{said_to_train(plan)}"
    yield Tile("Parameters", format_count(plan.parameters), count)
    names = [describe_shape(topology), topology.sold_as and f"sold as {topology.sold_as}"]
    if topology.device_count != topology.chips:
        names.append(f"{topology.device_count:,} devices")
    yield Tile("Chips", f"{topology.chips:,}", ", ".join(filter(None, names)))


def _speed_tiles(plan: Plan) -> Iterator[Tile]:
    found, time, speed = estimates_of(plan), plan.time, plan.speed
    if time is None:
        return
    yield Tile("Step time", found.step, f"estimate, {found.interval}", lead=True)
    if speed is None:
        return
    rate = f"estimate, {speed.tokens_per_second:,.0f} of all chips"
    yield Tile("Tokens/s a chip", found.rate, rate)
    full = f"estimate, attention once a visible pair; {percent(speed.mfu_full, 1)} in full"
    yield Tile("MFU", found.mfu, full)
    note = "no price of this chip is known"
    if speed.price_per_hour:
        note = f"estimate, {money(speed.price_per_hour, speed.currency)} an hour"
        note += f" by the price of {speed.priced}" if speed.priced else ""
    yield Tile("A million tokens", found.price, note)
