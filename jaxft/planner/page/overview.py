"""The parts of a page that say what a plan comes to: comparison, tiles, remedies, configuration."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from jaxft.config import RunConfig, to_dict, walk
from jaxft.formatting import format_bytes, format_count, format_seconds
from jaxft.planner.page.parts import (
    fit_words,
    html_table,
    interval,
    mesh_words,
    model_name,
    percent,
    section,
)
from jaxft.planner.plan import Plan, describe_shape
from jaxft.planner.show import flag
from jaxft.reporting.report import tile


def _money(amount: float, currency: str) -> str:
    return f"{amount:,.0f} {currency}" if amount >= 1000 else f"{amount:.3g} {currency}"


def comparison_section(plans: Sequence[Plan]) -> str:
    """Returns a table with a row for each plan, which leads to its own sections."""
    columns = ["Model", "Slice", "Strategy and mesh", "Memory of a device"]
    columns += [">Step", ">Tokens/s a chip", ">MFU", ">A million tokens"]
    rows = [_compared(number, plan) for number, plan in enumerate(plans, start=1)]
    note = "Steps and what follows from them are estimates; MFU counts each visible pair once."
    return (
        f'<section><h2>Comparison</h2><p class="dim">{note}</p>'
        f"{html_table(columns, rows, marks='compared')}</section>"
    )


def _compared(number: int, plan: Plan) -> list[str]:
    memory, time, speed = plan.memory, plan.time, plan.speed
    limit = format_bytes(memory.limit) if memory.limit else "?"
    step, rate, mfu, price = ("–",) * 4
    if time is not None:
        step = f"<b>{format_seconds(time.seconds)}</b><br><small>{interval(time)}</small>"
    if speed is not None:
        rate = f"<b>{speed.tokens_per_second_per_chip:,.0f}</b>"
        mfu = percent(speed.mfu, 1)
        if speed.price_per_hour:
            price = _money(speed.price_per_million_tokens, speed.currency)
    return [
        f'<a href="#plan-{number}"><b>{model_name(plan)}</b></a>',
        escape(plan.topology.name),
        f"{escape(plan.strategy)}<br><small>{escape(mesh_words(plan))}</small>",
        f'<span class="{"better" if plan.fits else "worse"}">{fit_words(plan)}</span>'
        f"<br><small>{format_bytes(memory.used)} / {limit}</small>",
        *(step, rate, mfu, price),
    ]


def tiles_section(plan: Plan) -> str:
    """Returns whether the plan fits, and its figures, in boxes."""
    memory, topology = plan.memory, plan.topology
    verdict, _, margin = fit_words(plan).partition(", ")
    of = f" of {format_bytes(memory.limit)}" if memory.limit else ""
    note = f"{margin}: " if margin else ""
    source = ", an estimate" if plan.source != "compiled" else ""
    fits = tile(
        "Memory", verdict.capitalize(), f"{note}{format_bytes(memory.used)}{of}{source}", lead=True
    )
    names = [describe_shape(topology), topology.sold_as and f"sold as {topology.sold_as}"]
    if topology.device_count != topology.chips:
        names.append(f"{topology.device_count:,} devices")
    boxes = [
        fits if plan.fits else fits.replace('class="tile', 'class="tile bad'),
        *_speed_tiles(plan),
        tile("Parameters", format_count(plan.parameters), f"{plan.parameters:,}"),
        tile("Chips", f"{topology.chips:,}", ", ".join(filter(None, names))),
    ]
    return f'<section class="tiles">{"".join(boxes)}</section>'


def _speed_tiles(plan: Plan) -> Iterator[str]:
    time, speed = plan.time, plan.speed
    if time is None:
        return
    yield tile("Step time", format_seconds(time.seconds), f"estimate, {interval(time)}", lead=True)
    if speed is None:
        return
    rate = f"estimate, {speed.tokens_per_second:,.0f} of all chips"
    yield tile("Tokens/s a chip", f"{speed.tokens_per_second_per_chip:,.0f}", rate)
    full = f"estimate, attention once a visible pair; {percent(speed.mfu_full, 1)} in full"
    yield tile("MFU", percent(speed.mfu, 1), full)
    if not speed.price_per_hour:
        yield tile("A million tokens", "–", "no price of this chip is known")
        return
    hourly = _money(speed.price_per_hour, speed.currency)
    yield tile(
        "A million tokens",
        _money(speed.price_per_million_tokens, speed.currency),
        f"estimate, {hourly} an hour"
        + (f" by the price of {speed.priced}" if speed.priced else ""),
    )


def notes(plan: Plan) -> str:
    """Returns what the plan says of itself."""
    return "".join(f'<p class="remark">{escape(note)}</p>' for note in plan.notes)


def remedies_section(plan: Plan) -> str:
    """Returns what was tried to make the run fit; empty if it does."""
    if not plan.remedies:
        return ""
    rows = [
        [
            escape(remedy.change),
            " ".join(
                f"<code>{escape(flag(key, value))}</code>" for key, value in remedy.flags.items()
            ),
            '<span class="better">fits</span>'
            if remedy.fits
            else '<span class="worse">does not fit</span>',
            format_bytes(remedy.used),
            format_seconds(remedy.seconds) if remedy.seconds else "–",
        ]
        for remedy in plan.remedies
    ]
    columns = ["Change", "Flags", "Then", ">Memory", ">Step, estimate"]
    how = "compiled" if plan.source == "compiled" else "estimated"
    text = f"Each was {how} to see whether the run then fits."
    return section("What would make it fit", text, html_table(columns, rows, marks="remedies"))


def evaluation_section(plan: Plan) -> str:
    """Returns time and memory of the evaluation step; empty if it was not asked for."""
    if not plan.evaluation_memory:
        return ""
    size = format_bytes(plan.evaluation_memory)
    if not plan.evaluation_fits:
        text = f"It would take {size} on a device and does not fit."
        return section("Evaluation step", "", f'<p class="remark bad">{text}</p>')
    text = f"It takes <b>{size}</b> on a device."
    if (time := plan.evaluation) is not None:
        text = (
            f"<b>{format_seconds(time.seconds)}</b> by estimate, {interval(time)}; it takes "
            f"<b>{size}</b> on a device."
        )
    return section("Evaluation step", "", f'<p class="remark">{text}</p>')


def configuration_section(plan: Plan) -> str:
    """Returns the keys that differ from their default."""
    defaults = to_dict(RunConfig())
    meanings = {item.path: item.meaning for item in walk(RunConfig())}
    rows = [
        [
            f"<code>{escape(key)}</code>",
            f"<code>{_literal(value)}</code>",
            f'<code class="dim">{_literal(defaults.get(key))}</code>',
            escape(meanings.get(key, "Not known to this version.")),
        ]
        for key, value in plan.settings.items()
        if value != defaults.get(key)
    ]
    if not rows:
        return ""
    table = html_table(["Key", "Value", "Default", "Meaning"], rows, marks="config")
    return section("Configuration", "Keys that differ from their default.", table)


def _literal(value: Any) -> str:
    return escape(str(value)).replace(",", ",<wbr>") if value not in ("", None) else "–"
