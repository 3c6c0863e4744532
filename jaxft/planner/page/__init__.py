"""Writes a page with pictures of plans: memory, the step's timeline, exchange, mesh and searches.

One file that needs no network and no script, with the details on hover. Estimates are marked.
"""

import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.files import write_text
from jaxft.formatting import format_bytes, format_seconds
from jaxft.planner.page.memory import memory_bar
from jaxft.planner.page.mesh import mesh_of
from jaxft.planner.page.overview import estimates_of, tiles_of
from jaxft.planner.page.parts import fit_words, interval, mesh_words, percent
from jaxft.planner.page.search import search_view
from jaxft.planner.page.step import time_of
from jaxft.planner.page.timeline import timeline_of
from jaxft.planner.plan import Plan
from jaxft.planner.show import flag, network_name
from jaxft.reporting.pages import keys_of, render, short_name

if TYPE_CHECKING:
    from jaxft.planner.search import Search


def write_page(file: str, plans: Sequence[Plan], searches: "Sequence[Search]" = ()) -> Path:
    """Writes the page and returns its path.

    Args:
      file: The path.
      plans: One section each; several are compared first.
      searches: One section each.

    Raises:
      TrainingError: If the file cannot be written.
    """
    page = render(
        "plans.html",
        title=_title(plans),
        compiled=any(plan.source == "compiled" for plan in plans),
        views=[_view(plan) for plan in plans],
        searches=[search_view(found) for found in searches],
        versions=" · ".join(_versions()),
        bytes=format_bytes,
        seconds=format_seconds,
        percent=percent,
        interval=interval,
        flag=flag,
        network_name=network_name,
    )
    path = Path(file)
    write_text(path, page)
    return path


def _title(plans: Sequence[Plan]) -> str:
    models = dict.fromkeys(short_name(plan.model) for plan in plans)
    return f"Plan of {', '.join(models)}" if len(models) in (1, 2) else "Plans"


def _view(plan: Plan) -> dict[str, Any]:
    """Returns the plan and what pictures and words are made from it."""
    return {
        "plan": plan,
        "name": short_name(plan.model),
        "fit": fit_words(plan),
        "mesh_words": mesh_words(plan),
        "estimates": estimates_of(plan),
        "tiles": list(tiles_of(plan)),
        "memory": memory_bar(plan),
        "timeline": timeline_of(plan),
        "time": time_of(plan),
        "mesh": mesh_of(plan),
        "settings": keys_of(plan.settings),
    }


def _versions() -> Iterator[str]:
    for name in ("jaxft", "jax", "jaxlib", "libtpu"):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
