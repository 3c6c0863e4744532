"""Plans and searches as tables for a terminal, and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jaxft.console import make_table, stdout
from jaxft.formatting import format_bytes, format_seconds
from jaxft.hardware.chips import Chip, Switch
from jaxft.planner.candidates import Candidate, Search
from jaxft.planner.fits import Fit
from jaxft.planner.plan import SCHEMA, Plan, StepTime, describe_shape, said_to_train
from jaxft.planner.timeline import ICI

# Rows of a search that are shown; all are in its JSON.
_SHOWN = 12


def print_plans(plans: Sequence[Plan]) -> None:
    """Prints each plan, and a line for each where there are several."""
    for plan in plans:
        print_plan(plan)
        stdout.print()
    if len(plans) > 1:
        _print_comparison(plans)


def print_plan(plan: Plan) -> None:
    """Prints what a run would cost: facts of the compiled program first, then estimates."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    _say(
        f"[bold]{escape(plan.model)}[/bold]: {plan.parameters:,} parameters{said_to_train(plan)}, "
        f"{escape(plan.strategy)} on {describe_shape(plan.topology)} ({mesh})"
    )
    _say(_verdict(plan))
    stdout.print(_memory_table(plan))
    if plan.memory.host:
        _say(f"In the host's memory, for each device: {format_bytes(plan.memory.host)}.")
    if plan.time is not None:
        _print_time(plan, plan.time)
    if plan.exchanges:
        stdout.print(_exchange_table(plan))
    if plan.evaluation_memory:
        _print_evaluation(plan)
    if plan.remedies:
        _print_remedies(plan)
    for note in plan.notes:
        _say(f"[dim]{escape(note)}[/dim]")


def _print_evaluation(plan: Plan) -> None:
    beside = plan.memory.kinds["optimizer"]
    takes = f"{format_bytes(plan.evaluation_memory)} beside {format_bytes(beside)} of optimizer"
    if not plan.evaluation_fits:
        rows = plan.settings["eval.batch_size"] or plan.settings["train.batch_size"]
        _say(
            f"[red]An evaluation step does not fit[/red]: {takes}. Set "
            f"--config.eval.batch_size to fewer rows than {rows}."
        )
        return
    seconds = f"{format_seconds(plan.evaluation.seconds)} (estimate), " if plan.evaluation else ""
    _say(f"An evaluation step takes {seconds}{takes}.")


def _say(text: str) -> None:
    stdout.print(text, highlight=False, soft_wrap=True)


def _verdict(plan: Plan) -> str:
    memory = plan.memory
    said = "" if plan.source == "compiled" else " by estimate"
    if not memory.limit:
        return f"It takes {format_bytes(memory.used)} of a device; how much there is is not known."
    if memory.fits:
        return (
            f"[green]Fits{said}[/green]: {format_bytes(memory.used)} of "
            f"{format_bytes(memory.limit)}, {format_bytes(memory.headroom)} are left."
        )
    if memory.headroom >= 0:
        return (
            f"[red]Does not fit the host{said}[/red]: {format_bytes(memory.host)} of its memory "
            f"for each device, of {format_bytes(memory.host_limit)}."
        )
    return (
        f"[red]Does not fit{said}[/red]: {format_bytes(memory.used)} of "
        f"{format_bytes(memory.limit)}, {format_bytes(-memory.headroom)} too much."
    )


def _memory_table(plan: Plan) -> Table:
    table = make_table(["memory of a device", "", "share"], left=1)
    for kind, size in plan.memory.kinds.items():
        if size:
            share = size / plan.memory.used if plan.memory.used else 0.0
            table.add_row(kind, format_bytes(size), f"{share:.0%}")
    return table


def _print_time(plan: Plan, time: StepTime) -> None:
    speed = plan.speed
    _say(
        f"A step takes about [bold]{format_seconds(time.seconds)}[/bold] (estimate; "
        f"{format_seconds(time.low)} to {format_seconds(time.high)})"
        + (f", {format_seconds(time.by_cycles)} by the compiler's cycles" if time.by_cycles else "")
        + "."
    )
    terms = ", ".join(f"{k} {format_seconds(s)}" for k, s in time.terms.items() if s)
    _say(f"  each on its own: {terms}")
    spent = sorted(time.spent.items(), key=lambda item: -item[1])
    _say(f"  spent: {', '.join(f'{k} {format_seconds(s)}' for k, s in spent if s > 1e-6)}")
    if speed is not None:
        _say(
            f"  {speed.tokens_per_second:,.0f} tokens/s, "
            f"{speed.tokens_per_second_per_chip:,.0f} a chip; "
            f"MFU {speed.mfu:.1%}, attention in full {speed.mfu_full:.1%}"
        )
        if speed.price_per_hour:
            priced = f", at the price of {speed.priced}" if speed.priced else ""
            _say(
                f"  {speed.price_per_million_tokens:.3g} {escape(speed.currency)} a million "
                f"tokens, {speed.price_per_hour:,.2f} an hour{escape(priced)}"
            )
    work = plan.work
    traffic = f"; {format_bytes(work.bytes)} of memory traffic" if work.bytes else ""
    _say(
        f"  {work.model_flops / 1e12:,.1f} TFLOP a device that the mathematics needs, "
        f"{work.flops / 1e12:,.1f} that run{traffic}"
    )


def _exchange_table(plan: Plan) -> Table:
    columns = ["collective", "mesh axes", "network", "count", "payload", "sent", "time", "hidden"]
    table = make_table(columns, left=3)
    for one in plan.exchanges:
        counted = f"{one.count:,}" if one.exact else f"at least {one.count:,}" if one.count else ""
        table.add_row(
            one.kind,
            ", ".join(one.axes),
            network_name(plan.topology.chip, one.network),
            counted,
            format_bytes(one.bytes),
            format_bytes(one.wire_bytes),
            format_seconds(one.seconds),
            f"{one.overlapped:.0%}",
        )
    return table


def network_name(chip: Chip, network: str) -> str:
    """Returns what `ici` and `dcn` are called where a chip is at home."""
    if chip.is_tpu:
        return network.upper()
    if isinstance(chip.network, Switch):
        return "NVLink" if network == ICI else "network"
    return "links"


def _print_remedies(plan: Plan) -> None:
    tried = "compiled" if plan.source == "compiled" else "estimated"
    _say(f"What was {tried} to see whether it would fit:")
    for remedy in plan.remedies:
        verdict = "[green]fits[/green]     " if remedy.fits else "[red]too large[/red]"
        step = f", a step {format_seconds(remedy.seconds)} (estimate)" if remedy.seconds else ""
        flags = " ".join(flag(key, value) for key, value in remedy.flags.items())
        _say(f"  {verdict} {escape(remedy.change)}: {format_bytes(remedy.used)}{step}")
        if remedy.fits:
            _say(f"            {escape(flags)}")


def flag(key: str, value: Any) -> str:
    """Returns the flag of the command that sets something."""
    return f"--{key}={value}" if key == "topology" else f"--config.{key}={value}"


def _print_comparison(plans: Sequence[Plan]) -> None:
    currencies = {plan.speed.currency for plan in plans if plan.speed}
    price = f"{'/'.join(sorted(currencies)) or 'price'}/M tokens"
    columns = ["slice", "strategy", "memory", "of", "step", "tokens/s/chip", "MFU", price]
    table = make_table(columns, left=2)
    for plan in plans:
        speed = plan.speed
        table.add_row(
            plan.topology.name,
            plan.strategy,
            Text(format_bytes(plan.memory.used), style="" if plan.fits else "red"),
            format_bytes(plan.memory.limit),
            format_seconds(plan.time.seconds) if plan.time else "does not fit",
            f"{speed.tokens_per_second_per_chip:,.0f}" if speed else "",
            f"{speed.mfu:.1%}" if speed else "",
            f"{speed.price_per_million_tokens:.3g}" if speed and speed.price_per_hour else "",
        )
    stdout.print(table)
    if all(plan.source == "compiled" for plan in plans):
        _say("[dim]Memory is the compiler's; times and what follows are estimates.[/dim]")
    elif any(plan.source == "compiled" for plan in plans):
        _say("[dim]Memory of what was compiled is the compiler's; all else is estimated.[/dim]")
    else:
        _say("[dim]Nothing was compiled: all figures are estimates.[/dim]")


def print_search(found: Search) -> None:
    """Prints the best candidates, and why others were left out."""
    best = found.best
    made = "compiled" if found.topology.can_compile else "planned by estimate"
    _say(
        f"{found.considered:,} candidates on {describe_shape(found.topology)}, {found.compiled} "
        f"{made} in {found.seconds:.0f} s."
    )
    table = make_table(["", "candidate", "memory", "step", "tokens/s/chip", "by"], left=2)
    for place, candidate in enumerate(found.candidates[:_SHOWN], start=1):
        table.add_row(
            str(place),
            candidate.name,
            format_bytes(candidate.bytes) if candidate.bytes else "",
            format_seconds(candidate.seconds) if candidate.estimate else "",
            _rate(candidate),
            candidate.outcome,
        )
    stdout.print(table)
    left = {}
    for candidate in found.candidates[_SHOWN:]:
        reason = candidate.outcome.partition(":")[0]
        left[reason] = left.get(reason, 0) + 1
    if left:
        _say(f"[dim]Not shown: {', '.join(f'{n} {reason}' for reason, n in left.items())}.[/dim]")
    if best is None and found.compiled:
        _say(f"[red]None of those that were {made} fits.[/red] Take a larger slice.")
    elif best is None:
        _say("[red]None is possible.[/red] The table says why.")


def _rate(candidate: Candidate) -> str:
    plan = candidate.plan
    if plan is None or plan.speed is None:
        return ""
    return f"{plan.speed.tokens_per_second_per_chip:,.0f}"


def print_fits(model: str, fits: Sequence[Fit]) -> None:
    """Prints the smallest slice of each chip for each way to tune a model."""
    settings = next((fit.plan.settings for fit in fits if fit.plan), {})
    rows = f", rows of {settings['data.max_length']:,} tokens" if settings else ""
    _say(f"[bold]{escape(model)}[/bold]{rows}: the smallest slice of each chip.")
    currencies = {fit.plan.speed.currency for fit in fits if fit.plan and fit.plan.speed}
    price = f"{'/'.join(sorted(currencies)) or 'price'}/M tokens"
    columns = ["tuning", "slice", "memory", "of", "kept", "rows", "tokens/s/chip", price]
    table = make_table(columns, left=2)
    for fit in fits:
        table.add_row(*_fit_cells(fit))
    stdout.print(table)
    for method, plan in {fit.method: fit.plan for fit in fits if fit.plan}.items():
        _say(f"{method}: {plan.parameters:,} parameters{said_to_train(plan)}.")
    reasons: dict[str, list[str]] = {}
    for fit in fits:
        if fit.plan is None:
            reasons.setdefault(fit.reason, []).append(f"{fit.method} on {fit.chip}")
    for reason, names in reasons.items():
        _say(f"[dim]{', '.join(names)}: {escape(reason)}[/dim]")
    _say(
        "[dim]All are estimates in closed form; none was compiled. Let the compiler say what one "
        "takes: jaxft plan --topology=SLICE, with the flags of --json.[/dim]"
    )


def _fit_cells(fit: Fit) -> list[str]:
    plan = fit.plan
    if plan is None:
        verdict = "does not fit" if fit.is_known else "not known"
        return [fit.method, fit.chip, "", "", "", "", verdict, ""]
    speed = plan.speed
    micro = fit.flags["train.accumulation"]
    rows = f"{fit.flags['train.batch_size']}" + (f" in {micro}" if micro > 1 else "")
    return [
        fit.method,
        plan.topology.sold_as or plan.topology.name,
        format_bytes(plan.memory.used),
        format_bytes(plan.memory.limit),
        fit.flags["model.remat"],
        rows,
        f"{speed.tokens_per_second_per_chip:,.0f}" if speed else "",
        f"{speed.price_per_million_tokens:.3g}" if speed and speed.price_per_hour else "",
    ]


def record_fits(fits: Sequence[Fit]) -> dict[str, Any]:
    """Returns the fits for JSON."""
    return {
        "schema": SCHEMA,
        "fits": [
            {
                "method": fit.method,
                "chip": fit.chip,
                "flags": fit.flags,
                "reason": fit.reason,
                "known": fit.is_known,
                "plan": fit.plan and fit.plan.record(),
            }
            for fit in fits
        ],
    }


def record(plans: Sequence[Plan], searches: Sequence[Search] = ()) -> dict[str, Any]:
    """Returns plans and searches for JSON; `docs/planning.md` describes the form."""
    return {
        "schema": SCHEMA,
        "plans": [plan.record() for plan in plans],
        "searches": [_search_record(found) for found in searches],
    }


def _search_record(found: Search) -> dict[str, Any]:
    return {
        "topology": found.topology.name,
        "seconds": found.seconds,
        "candidates": [
            {
                "flags": candidate.flags,
                "outcome": candidate.outcome,
                "estimated_seconds": candidate.estimate and candidate.estimate.seconds,
                "estimated_bytes": candidate.estimate and candidate.estimate.bytes,
                "plan": candidate.plan and candidate.plan.record(),
            }
            for candidate in found.candidates
        ],
    }
