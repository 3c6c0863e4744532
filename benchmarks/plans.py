r"""Makes docs/plans: plans of three models on slices of three kinds, with pictures.

    python -m benchmarks.plans ../shared/configs --output docs/plans

Compiles jaxft's step for each; needs libtpu and no TPU, some 15 minutes of two cores at first. The
folder gets a page and a picture for each model, and README.md with a table.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jaxft.compiled.layout import format_bytes
from jaxft.config import RunConfig
from jaxft.files import write_text
from jaxft.hf.folder import read_config
from jaxft.models.families import architecture_from_hf
from jaxft.planner.page import write_page
from jaxft.planner.plan import Plan
from jaxft.planner.planner import Planner
from jaxft.planner.prices import read_prices
from jaxft.planner.show import format_seconds
from jaxft.planner.topology import compiler_version, parse, use_compiler_alone


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and where it is planned.

    Attributes:
      name: Of the files.
      title: Of the model.
      folder: That holds its config.json.
      slices: Each with the rows of one device.
      remat: As `model.remat`.
      strategy: As `strategy`.
      capacity: As `model.expert_capacity`.
    """

    name: str
    title: str
    folder: str
    slices: tuple[tuple[str, int], ...]
    remat: str = "full"
    strategy: str = "fsdp"
    capacity: float = 0.0


_LENGTH = 4096
CASES = (
    Case(
        name="llama-3.1-8b",
        title="Llama-3.1-8B",
        folder="meta-llama--Meta-Llama-3.1-8B",
        slices=(("v5e:4x4", 2), ("v5p-16", 4), ("v6e-8", 4)),
    ),
    Case(
        name="llama-3.1-70b",
        title="Llama-3.1-70B",
        folder="meta-llama--Meta-Llama-3.1-70B",
        slices=(("v5e:16x16", 1), ("v5p-128", 4), ("v6e:8x8", 1)),
    ),
    Case(
        name="qwen3-30b-a3b",
        title="Qwen3-30B-A3B",
        folder="Qwen--Qwen3-30B-A3B",
        slices=(("v5e:8x8", 1), ("v5p-64", 2), ("v6e:4x8", 1)),
        capacity=1.25,
    ),
)


def plans_of(case: Case, models: Path) -> list[Plan]:
    """Plans a model on each of its slices."""
    architecture = architecture_from_hf(read_config(models / case.folder))
    planner = Planner(architecture=architecture, prices=read_prices())
    found = []
    for name, rows in case.slices:
        topology = parse(name)
        config = RunConfig(strategy=case.strategy)
        config.model.path, config.model.remat = case.title, case.remat
        config.model.expert_capacity = case.capacity
        config.data.max_length = _LENGTH
        config.train.batch_size = rows * topology.device_count
        found.append(planner.plan(config, topology, evaluation=True))
        print(f"{case.title} on {name}: {_step(found[-1])}", flush=True)
    return found


def _step(plan: Plan) -> str:
    return format_seconds(plan.time.seconds) if plan.time else "does not fit"


def row(plan: Plan) -> str:
    """Returns a row of the table."""
    speed, time = plan.speed, plan.time
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    cells = [
        plan.model,
        f"`{plan.topology.name}`",
        f"{plan.strategy}, {mesh}",
        f"{format_bytes(plan.memory.used)} of {format_bytes(plan.memory.limit)}",
        f"{_step(plan)} ({time.low:.3g}–{time.high:.3g})" if time else "does not fit",
        f"{speed.tokens_per_second_per_chip:,.0f}" if speed else "",
        f"{speed.mfu:.1%}" if speed else "",
        f"{speed.price_per_million_tokens:.3f}" if speed else "",
        f"{plan.compile_seconds:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


# Colours of the stacked bars, by what they show; in the order of the legend.
_MEMORY = {
    "parameters": "#4c78a8",
    "optimizer": "#72b7b2",
    "gradients": "#e45756",
    "activations": "#f58518",
    "logits": "#eeca3b",
    "weights": "#b279a2",
    "temporaries": "#9d755d",
    "other": "#bab0ac",
}
_TIME = {
    "matmul": "#4c78a8",
    "attention": "#b279a2",
    "memory": "#54a24b",
    "wait ici": "#e45756",
    "wait dcn": "#9d0208",
    "wait host": "#f58518",
    "other": "#bab0ac",
}
_WIDTH, _LEFT, _BAR = 860, 110, 22


def picture(title: str, plans: Sequence[Plan]) -> str:
    """Returns an SVG: for each slice its memory against the limit, and what the step's time is."""
    rows: list[str] = []
    y = 46
    for plan in plans:
        scale = (_WIDTH - _LEFT - 20) / max(plan.memory.limit, plan.memory.used)
        rows.append(_text(10, y + 15, plan.topology.name, bold=True))
        rows += _stack(_grouped(plan.memory.kinds, _MEMORY), _MEMORY, y, scale, format_bytes)
        limit = _LEFT + plan.memory.limit * scale
        rows.append(
            f'<path d="M{limit:.1f} {y - 4}V{y + _BAR + 4}" stroke="#d62728" stroke-width="2"/>'
        )
        label = f"{format_bytes(plan.memory.used)} of {format_bytes(plan.memory.limit)}"
        rows.append(_text(_LEFT, y + _BAR + 14, label))
        y += _BAR + 26
        if plan.time is not None:
            whole = (_WIDTH - _LEFT - 20) / plan.time.seconds
            rows += _stack(_grouped(plan.time.spent, _TIME), _TIME, y, whole, format_seconds)
            label = f"{format_seconds(plan.time.seconds)} a step (estimate)"
            rows.append(_text(_LEFT, y + _BAR + 14, label))
            y += _BAR + 34
    rows += _legend(y + 6)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 62}" '
        f'width="{_WIDTH}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f"{_text(10, 24, f'{title}: memory of a device, and the time of a step', bold=True)}"
        f"{''.join(rows)}</svg>\n"
    )


def _grouped(values: dict[str, float] | dict[str, int], known: dict[str, str]) -> dict[str, float]:
    found = dict.fromkeys(known, 0.0)
    for name, value in values.items():
        found[name if name in known else "other"] += value
    return found


def _stack(
    values: dict[str, float], colours: dict[str, str], y: int, scale: float, form
) -> Iterator[str]:
    x = float(_LEFT)
    for name, value in values.items():
        width = value * scale
        if width > 0.2:
            yield (
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" '
                f'fill="{colours[name]}"><title>{escape(name)} {form(value)}</title></rect>'
            )
        x += width


def _legend(y: int) -> Iterator[str]:
    for line, colours in enumerate((_MEMORY, _TIME)):
        x = _LEFT
        for name, colour in colours.items():
            yield f'<rect x="{x}" y="{y + 20 * line}" width="11" height="11" fill="{colour}"/>'
            yield _text(x + 15, y + 20 * line + 10, name)
            x += 30 + 7 * len(name)


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="#222222"{weight}>{escape(text)}</text>'


def readme(sections: list[tuple[Case, list[Plan]]]) -> str:
    """Returns the text of the folder's README."""
    lines = [
        "# Plans",
        "",
        f"Made by `python -m benchmarks.plans` with libtpu {compiler_version()}; nothing was run",
        f"on TPUs. Rows of {_LENGTH:,} tokens, float32 parameters and moments, bfloat16 compute,",
        "layers' inputs kept. Memory is the compiler's; times, with the interval in which",
        "published runs lay around their predictions, and what follows from them are estimates",
        "([how they are made](../planning.md#how-times-are-made)). Prices are list prices.",
        "",
        "| model | slice | strategy, mesh | memory of a device | step, s | tokens/s/chip | MFU | "
        "USD/M tokens | compiled in |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(plan) for _, plans in sections for plan in plans),
        "",
    ]
    for case, _ in sections:
        lines += [
            f"## {case.title}",
            "",
            f"![{case.title}]({case.name}.svg)",
            "",
            f"With timelines, collectives and meshes: [{case.name}.html]({case.name}.html).",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Plans every case and writes the folder."""
    parser = argparse.ArgumentParser(description="Makes docs/plans.")
    parser.add_argument("models", type=Path, help="folder of folders with config.json")
    parser.add_argument("--output", type=Path, required=True, help="folder that is written to")
    options = parser.parse_args()
    use_compiler_alone()
    options.output.mkdir(parents=True, exist_ok=True)
    sections = []
    for case in CASES:
        plans = plans_of(case, options.models)
        sections.append((case, plans))
        write_text(options.output / f"{case.name}.svg", picture(case.title, plans))
        write_page(str(options.output / f"{case.name}.html"), plans)
    write_text(options.output / "README.md", readme(sections))


if __name__ == "__main__":
    main()
