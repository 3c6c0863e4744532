"""Writes a page with pictures of plans: memory, the step's timeline, exchange, mesh and searches.

One file that needs no network and no script, with the details on hover. Estimates are marked.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.files import write_text
from jaxft.planner.page.memory import memory_section
from jaxft.planner.page.mesh import mesh_section
from jaxft.planner.page.overview import (
    comparison_section,
    configuration_section,
    evaluation_section,
    notes,
    remedies_section,
    tiles_section,
)
from jaxft.planner.page.parts import model_name
from jaxft.planner.page.search import search_section
from jaxft.planner.page.step import collectives_section, time_section, timeline_section
from jaxft.planner.page.style import STYLE
from jaxft.planner.plan import Plan
from jaxft.reporting.report import page, short_name

if TYPE_CHECKING:
    from jaxft.planner.search import Search


def write_page(file: str, plans: Sequence[Plan], searches: "Sequence[Search]" = ()) -> Path:
    """Writes the page and returns its path.

    Args:
      file: Where.
      plans: One section each; several are compared first.
      searches: One section each.

    Raises:
      TrainingError: If the file cannot be written.
    """
    sections = [comparison_section(plans)] if len(plans) > 1 else []
    sections += [search_section(found) for found in searches]
    for number, plan in enumerate(plans, start=1):
        sections += _sections(number, plan)
    sections.append(_versions())
    path = Path(file)
    write_text(path, page(_title(plans), _subtitle(plans), sections, style=STYLE))
    return path


def _title(plans: Sequence[Plan]) -> str:
    models = dict.fromkeys(short_name(plan.model) for plan in plans)
    return f"Plan of {', '.join(models)}" if len(models) in (1, 2) else "Plans"


def _subtitle(plans: Sequence[Plan]) -> str:
    if any(plan.source == "compiled" for plan in plans):
        return (
            "Nothing was run. Memory and collectives are what the compiled program says; "
            "<b>times, and all that follows from them, are estimates</b>."
        )
    return "Nothing was run. <b>All figures are estimates.</b>"


def _sections(number: int, plan: Plan) -> Iterator[str]:
    heading = f"{model_name(plan)}: {escape(plan.strategy)} on {escape(plan.topology.name)}"
    yield f'<h2 class="plan" id="plan-{number}">{heading}</h2>'
    yield tiles_section(plan)
    yield notes(plan)
    yield memory_section(plan)
    yield remedies_section(plan)
    yield timeline_section(plan)
    yield time_section(plan)
    yield collectives_section(plan)
    yield mesh_section(plan)
    yield evaluation_section(plan)
    yield configuration_section(plan)


def _versions() -> str:
    found = []
    for name in ("jaxft", "jax", "jaxlib", "libtpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f'<footer class="dim">{escape(" · ".join(found))}</footer>'
