"""The part of a page that shows the memory of a device against its limit."""

from jaxft.formatting import format_bytes
from jaxft.planner.page.parts import Share, css_number, fit_words, legend, section, stacked_bar
from jaxft.planner.plan import Plan

# What the compiled program states; the rest of the memory is split by its schedule.
_FACTS = ("parameters", "optimizer", "reference", "batch", "padding", "program")
# Of a program that does not fit only its arguments and gradients are known.
_FACTS_WITHOUT_PROGRAM = ("parameters", "optimizer", "reference", "gradients")


def memory_section(plan: Plan) -> str:
    """Returns the memory of one device by kind, facts apart from what is split, and the host's."""
    memory = plan.memory
    kinds = {kind: size for kind, size in memory.kinds.items() if size > 0}
    known = _FACTS if plan.fits else _FACTS_WITHOUT_PROGRAM
    facts = [Share(kind, kinds[kind]) for kind in known if kind in kinds]
    rest = [Share(kind, size) for kind, size in kinds.items() if kind not in known]
    whole = max(memory.limit, memory.used, sum(kinds.values()), 1)
    bar = stacked_bar([*facts, *rest], whole, format_bytes, over=_limit(plan, whole))
    used = f"{format_bytes(memory.used)} used"
    host = ""
    if memory.host:
        width = css_number(min(100.0, 100 * memory.host / whole))
        cut = " cut" if memory.host > whole else ""
        note = ", longer than drawn" if cut else ""
        host = (
            f'<div class="row"><b>host</b><div class="bar host{cut}"><i class="k k-host" '
            f'style="width:{width}%" title="host {format_bytes(memory.host)}"><u>'
            f"{format_bytes(memory.host)} of the host's memory for this device{note}</u></i>"
            "</div></div>"
        )
    picture = (
        f'<div class="card memory"><div class="row"><b>device</b><div>{_limit_label(plan, whole)}'
        f"{bar}</div></div>{host}{_memory_legend(plan, facts, rest)}</div>"
    )
    return section("Memory of one device", f"{used}; {fit_words(plan)}.", picture)


def _memory_legend(plan: Plan, facts: list[Share], rest: list[Share]) -> str:
    used = max(plan.memory.used, 1)
    if plan.source != "compiled":
        return "<h4>Estimates</h4>" + legend([*facts, *rest], used, format_bytes)
    names = ", ".join(share.name for share in facts)
    first = f"Facts of the compiled program, as is the total: {names}"
    second = "Split by the schedule at its fullest moment, scaled to the compiler's sum"
    if not plan.fits:
        first = f"Known without a program: {names}; the compiler says the total"
        second = "The rest, which the compiler does not split"
    return (
        f"<h4>{first}</h4>{legend(facts, used, format_bytes)}"
        f"<h4>{second}</h4>{legend(rest, used, format_bytes)}"
    )


def _limit(plan: Plan, whole: float) -> str:
    """Marks what is left, or what is over the limit."""
    memory = plan.memory
    if not memory.limit:
        return ""
    at = 100 * memory.limit / whole
    if memory.fits:
        width = css_number(100 * memory.headroom / whole)
        return (
            f'<span class="left" style="width:{width}%" '
            f'title="{format_bytes(memory.headroom)} left"></span>'
        )
    over = format_bytes(-memory.headroom)
    return (
        f'<span class="over" style="left:{css_number(at)}%;width:{css_number(100 - at)}%" '
        f'title="{over} over the limit"></span>'
    )


def _limit_label(plan: Plan, whole: float) -> str:
    memory = plan.memory
    if not memory.limit:
        return ""
    at = css_number(100 * memory.limit / whole)
    text = f"limit {format_bytes(memory.limit)}"
    if not memory.fits:
        text += f" <em>+ {format_bytes(-memory.headroom)}</em>"
    return (
        f'<div class="limit"><span style="right:{css_number(100 - float(at))}%">{text}</span></div>'
    )
