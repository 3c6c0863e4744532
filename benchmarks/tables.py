"""Makes the tables and pictures of docs/performance.md from the lines in benchmarks/results.

    python -m benchmarks.tables           # prints the tables
    python -m benchmarks.tables --write   # puts them into the document, and draws the pictures

Of a measurement that several files have, the newest counts, by the date in its name. Ratios are of
medians; their 95 % intervals go by Student's t of the rounds' log ratios (`benchmarks/turns.py`).
Pictures need matplotlib (`pip install -e '.[bench]'`). They carry the digest of what they show, by
which a test knows that they are of these lines.
"""

import argparse
import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.turns import FIGURE, ratio
from jaxft.formatting import format_bytes, format_seconds

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/performance.md"
IMAGES = ROOT / "docs/images"
BEGIN, END = "<!-- from here: python -m benchmarks.tables --write -->", "<!-- to here -->"
Line = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One workload by two systems, in turns.

    Attributes:
      label: The workload in words.
      ours: jaxft's figure of each round.
      theirs: The other's; empty if it was not measured.
      machine: Where they ran.
    """

    label: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    machine: str

    @property
    def ratio(self) -> tuple[float, float | None, float | None]:
        """The ratio of medians, ours over theirs, and its interval."""
        return ratio(self.ours, self.theirs)


@dataclass(frozen=True)
class Step:
    """A planned step of two programs.

    Attributes:
      label: Slice and rows.
      ours: Seconds of jaxft's by what they are spent on.
      theirs: Seconds of the other's.
    """

    label: str
    ours: Mapping[str, float]
    theirs: Mapping[str, float]


def read_lines(folder: Path, name: str = "") -> Iterator[tuple[str, Line]]:
    """Yields file name and line of all result files whose name ends so, the oldest file first."""
    for file in sorted(folder.glob(f"*{name}.jsonl")):
        for text in file.read_text().splitlines():
            yield file.name, json.loads(text)


def newest(lines: Iterable[tuple[str, Line]], measurement: str, keys: Sequence[str]) -> list[Line]:
    """Returns a measurement's lines: of each workload those of the newest file that has it."""
    found: dict[tuple, tuple[str, list[Line]]] = {}
    for file, line in lines:
        # Lines of variants that were compared stand for themselves.
        if line.get("measurement") != measurement or "variant" in line or "case" in line:
            continue
        work = tuple(json.dumps(line.get(key, _DEFAULTS.get(key))) for key in keys)
        if work not in found or found[work][0] != file:
            found[work] = file, []
        found[work][1].append(line)
    return [line for _, of_file in found.values() for line in of_file]


# What lines that are older than a field mean.
_DEFAULTS: Line = {"set": [], "trained": 1.0}
_OF_STEPS = ("shape", "rows", "length", "dtypes", "packed", "trained", "set")
_OF_TEXTS = ("shape", "rows", "length", "new", "dtypes")


def pairs(lines: Sequence[Line], keys: Sequence[str], figure: str = FIGURE) -> list[Pair]:
    """Returns the workloads of lines, with each system's rounds in order."""
    found: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        by_system = found.setdefault(_label(line, keys), {"jaxft": [], "torch": []})
        by_system[line["system"]].append(line)
    return [
        Pair(
            label,
            *(tuple(line[figure] for line in of[system]) for system in ("jaxft", "torch")),
            machine=of["jaxft"][0]["processor"],
        )
        for label, of in found.items()
    ]


def _label(line: Line, keys: Sequence[str]) -> str:
    """Returns a workload in words."""
    words = [line["shape"], f"{line['rows']} × {line['length']}"]
    if "new" in keys:
        words = [line["shape"], f"{line['rows']} text{'s' if line['rows'] > 1 else ''}"]
        words.append(f"{line['length']} + {line['new']} tokens")
    words.append(line["dtypes"])
    if line.get("packed"):
        words.append("packed")
    if line.get("trained", 1.0) != 1.0:
        words.append(f"{100 * line['trained']:.0f} % trained")
    words += [key for key in line.get("set", ()) if not key.startswith("model.dtypes=")]
    return ", ".join(words)


def steps(folder: Path) -> list[Step]:
    """Returns the planned steps that another program was planned for, too."""
    keys = ("model", "slice", "length", "rows_per_device")
    ours, theirs = ({}, {})
    for name, table, chosen in (
        # The chip's own options with products in bfloat16, and what MaxText has by default.
        ("tpu-steps", ours, lambda line: line["options"] and not line.get("matmul")),
        ("peers", theirs, lambda line: not line["options"]),
    ):
        for _, line in read_lines(folder, name):
            if chosen(line) and line.get("strategy", "fsdp") == "fsdp" and line["spent"]:
                table[tuple(line[key] for key in keys)] = line["spent"]
    return [
        Step(f"{slice_}, {rows} × {length:,}", ours[key], theirs[key])
        for key in theirs
        if key in ours
        for _, slice_, length, rows in [key]
    ]


def markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Returns a table, or nothing without rows; `head` has its columns, separated by `|`."""
    columns, body = [column.strip() for column in head.split("|")], list(rows)
    lines = [columns, ["---"] * len(columns), *body] if body else []
    return "\n".join(f"| {' | '.join(line)} |".replace(" --- ", "---") for line in lines)


def with_interval(found: tuple[float, float | None, float | None]) -> str:
    """Returns `1.10 (0.63 to 1.91)`."""
    value, low, high = found
    return f"{value:.2f}" if low is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def beside_torch(found: Sequence[Pair]) -> str:
    """Returns the table of throughput beside PyTorch."""
    return markdown(
        "work | jaxft, tokens/s | PyTorch, tokens/s | ratio (95 % interval) | rounds | machine",
        (
            [
                pair.label,
                f"{statistics.median(pair.ours):,.0f}",
                f"{statistics.median(pair.theirs):,.0f}" if pair.theirs else "",
                with_interval(pair.ratio) if pair.theirs else "",
                f"{len(pair.ours)}",
                pair.machine,
            ]
            for pair in found
        ),
    )


def planned(found: Sequence[Step]) -> str:
    """Returns the table of planned steps beside MaxText's."""

    def cells(spent: Mapping[str, float]) -> list[str]:
        links = sum(spent.get(f"wait {kind}", 0.0) for kind in ("ici", "dcn"))
        return [f"{sum(spent.values()):.2f}", f"{1e3 * links:.0f}"]

    return markdown(
        "slice, rows a chip | MaxText, s | waiting for links, ms | jaxft, s | "
        "waiting for links, ms | ratio",
        (
            [
                "`{}`, {}".format(*step.label.split(", ", 1)),
                *(*cells(step.theirs), *cells(step.ours)),
                f"{sum(step.ours.values()) / sum(step.theirs.values()):.2f}",
            ]
            for step in found
        ),
    )


def saving(lines: Sequence[Line]) -> str:
    """Returns the table of checkpoints."""
    return markdown(
        "work | checkpoint | held up for | on disk after | step | step meanwhile",
        (
            [
                _label(line, _OF_STEPS),
                format_bytes(line["checkpoint_bytes"]),
                *(format_seconds(line[f"{name}_seconds"]) for name in ("held_up", "background")),
                format_seconds(line["step_seconds"]),
                format_seconds(line["step_seconds_meanwhile"]),
            ]
            for line in lines
        ),
    )


def input_pipeline(lines: Sequence[Line]) -> str:
    """Returns the table of the input pipeline."""
    return markdown(
        "work | prepared, rows/s | read, rows/s | devices waited for rows",
        (
            [
                f"{line['shape']}, {line['rows']} × {line['length']}",
                f"{line['prepared_rows_per_second']:,.0f}",
                f"{line['read_rows_per_second']:,.0f}",
                f"{100 * line['data_share']:.1f} %",
            ]
            for line in lines
        ),
    )


def changes(lines: Sequence[Line]) -> str:
    """Returns the table of compared variants."""
    return markdown(
        "benchmark | of | over | ratio (95 % interval) | rounds",
        (
            [
                f"`{line['benchmark']} {line['arguments']}`",
                f"`{line['of']}`",
                f"`{line['over']}`",
                with_interval((line["ratio"], line["low"], line["high"])),
                f"{line['rounds']}",
            ]
            for line in lines
        ),
    )


def on_gpu(lines: Sequence[Line]) -> str:
    """Returns the table of `gpu.py`'s lines."""
    return markdown(
        "case | system | tokens/s | MFU | memory of the step",
        (
            [
                line["case"],
                line["system"],
                f"{line[FIGURE]:,.0f}" if FIGURE in line else line["failed"].partition(":")[0],
                f"{100 * line['mfu']:.1f} %" if line.get("mfu") else "",
                format_bytes(line["step_bytes"]) if line.get("step_bytes") else "",
            ]
            for line in lines
        ),
    )


def workloads(folder: Path) -> dict[str, list[Pair]]:
    """Returns what was measured beside PyTorch, by measurement."""
    lines = list(read_lines(folder))
    keys = {"train_step": _OF_STEPS, "evaluation": _OF_STEPS, "generation": _OF_TEXTS}
    return {name: pairs(newest(lines, name, of), of) for name, of in keys.items()}


def sections(folder: Path) -> Iterator[str]:
    """Yields each table under its heading, of what there are lines of."""
    lines, beside = list(read_lines(folder)), workloads(folder)
    of_gpu = {line["case"] + line["system"]: line for _, line in read_lines(folder, "-gpu")}
    parts = (
        ("Training steps beside PyTorch", beside_torch(beside["train_step"]), "training-steps"),
        ("Evaluation beside PyTorch", beside_torch(beside["evaluation"]), ""),
        ("Generation beside transformers", beside_torch(beside["generation"]), "generation"),
        ("On a GPU", on_gpu(list(of_gpu.values())), ""),
        ("Checkpoints", saving(newest(lines, "saving", _OF_STEPS)), ""),
        ("Input", input_pipeline(newest(lines, "input_pipeline", _OF_STEPS)), ""),
        ("Changes", changes([line for _, line in lines if "benchmark" in line]), ""),
        ("Planned steps of Llama-3.1-8B beside MaxText's", planned(steps(folder)), "tpu-steps"),
    )
    for title, table, picture in parts:
        if table:
            shown = f"![{title}](images/{picture}.png)\n\n" if picture else ""
            yield f"### {title}\n\n{shown}{table}"


def text(folder: Path = RESULTS) -> str:
    """Returns what docs/performance.md has of the results."""
    return "\n\n".join(sections(folder))


def with_tables(page: str, tables: str) -> str:
    """Returns the document with these tables between its two marks."""
    pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"\n{tables}\n\n", page)
    if count != 1:
        raise SystemExit(f"{PAGE} has not one pair of the marks {BEGIN} and {END}.")
    return changed


def pictures(folder: Path = RESULTS) -> dict[str, list[Any]]:
    """Returns what each picture shows, by its name."""
    beside = {
        name: [pair for pair in found if pair.theirs] for name, found in workloads(folder).items()
    }
    return {
        "training-steps": beside["train_step"],
        "generation": beside["generation"],
        "tpu-steps": steps(folder),
    }


def digest(shown: Sequence[Any]) -> str:
    """Returns what tells what a picture shows from anything else."""
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def main() -> None:
    """Prints the tables, or writes all that is made of the lines."""
    parser = argparse.ArgumentParser(description="Makes tables and pictures of results.")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md and images")
    options = parser.parse_args()
    print(text())
    if options.write:
        from benchmarks import plots

        PAGE.write_text(with_tables(PAGE.read_text(), text()))
        for name, shown in pictures().items():
            plots.draw(name, shown, IMAGES / f"{name}.png", digest(shown))


if __name__ == "__main__":
    main()
