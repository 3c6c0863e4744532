"""Measurements in turns, each in a process of its own, and the ratio of two sides.

A benchmark of one system is a function from options to a record. `run` makes a command of it:
jaxft alone, or in turns with PyTorch; `compare.py` lets any two variants take turns.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import put
from jaxft.errors import JaxftError
from jaxft.hardware import huge_pages

FIGURE = "tokens_per_second"
INTERVAL = "95 %, Student's t of the rounds' log ratios"
Record = dict[str, Any]


class Failed(Exception):
    """A measurement that gave no record.

    Attributes:
      said: All that it wrote.
    """

    def __init__(self, problem: str, said: str = ""):
        super().__init__(problem)
        self.said = said


def add_options(parser: argparse.ArgumentParser, *, torch: bool = True) -> None:
    """Adds how often and beside what is measured.

    Args:
      parser: Of the benchmark.
      torch: Whether it has PyTorch's side.
    """
    parser.add_argument("--rounds", type=int, default=3)
    if torch:
        parser.add_argument("--torch-python", default="", help="Python with torch, transformers")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    # Measures this system in this process, and prints its record.
    parser.add_argument("--once", choices=("jaxft", "torch"), help=argparse.SUPPRESS)


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Record],
    *,
    keys: Sequence[str],
    torch: Callable[[argparse.Namespace], Record] | None = None,
    figure: str = FIGURE,
    equal: Sequence[str] = (),
) -> None:
    """Measures as the options of `add_options` say, and prints a line for each measurement.

    Args:
      options: All options.
      measure: Gives jaxft's record.
      keys: Names of the options that the line of the ratio repeats.
      torch: Gives PyTorch's record.
      figure: Name of the figure that the ratio is of.
      equal: Figures of both systems that are the same if they do the same.
    """
    if options.once:
        if options.once == "jaxft":
            # As the commands of jaxft do.
            huge_pages.start_again_with_them()
        chosen = measure if options.once == "jaxft" else torch
        assert chosen is not None
        try:
            print(json.dumps(chosen(options)))
        except (JaxftError, Failed) as error:
            raise SystemExit(str(error)) from error
    else:
        systems = ("jaxft", "torch") if torch and options.torch_python else ("jaxft",)
        command = [sys.executable, *sys.orig_argv[1:], "--once"]
        take_turns(
            {system: lambda system=system: once([*command, system]) for system in systems},
            rounds=options.rounds,
            output=options.output,
            about={key: getattr(options, key) for key in keys},
            figure=figure,
            equal=equal,
        )


def take_turns(
    sides: Mapping[str, Callable[[], Record]],
    *,
    rounds: int,
    output: Path | None,
    about: Record,
    figure: str = FIGURE,
    equal: Sequence[str] = (),
) -> None:
    """Measures one side or two in turns; prints each record, and of two sides their ratio.

    Every other round begins with the second side, so that a machine that slows down or speeds up
    serves neither.

    Args:
      sides: What measures, by name.
      rounds: Measurements of each.
      output: File that the lines are appended to as well.
      about: What is measured, for the line of the ratio.
      figure: Name of the compared figure in the records.
      equal: Names of figures that both sides must agree in.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        records = {}
        for name in list(sides)[:: -1 if number % 2 else 1]:
            records[name] = _measured(name, sides[name], figure) | {"processor": processor()}
            found[name].append(records[name][figure])
            put(records[name], output)
        for key in equal:
            values = {name: record[key] for name, record in records.items()}
            if len(set(values.values())) > 1:
                raise SystemExit(f"The systems do not do the same: {key} is {values}.")
    if len(sides) == 2:
        put(ratio_line(found, figure=figure, about=about) | {"processor": processor()}, output)


def _measured(name: str, measure: Callable[[], Record], figure: str) -> Record:
    try:
        record = measure()
    except Failed as error:
        raise SystemExit(f"{name} {error}") from error
    if figure not in record:
        numbers = [key for key, value in record.items() if isinstance(value, int | float)]
        raise SystemExit(f"{name} measured no {figure!r}, but {', '.join(numbers)}.")
    return record


def ratio_line(found: Mapping[str, Sequence[float]], *, figure: str, about: Record) -> Record:
    """Returns the line of the first side's figure over the second's, by round."""
    (of, first), (over, second) = found.items()
    value, low, high = ratio(first, second)
    return {
        "measurement": "ratio",
        **about,
        "figure": figure,
        "rounds": len(first),
        "of": of,
        "over": over,
        "medians": {of: statistics.median(first), over: statistics.median(second)},
        "ratio": round(value, 3),
        "low": low and round(low, 3),
        "high": high and round(high, 3),
        "interval": INTERVAL,
    }


def ratio(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """Returns the ratio of medians, and the interval of paired ratios; None of a single round.

    The interval is exp(m ± t s / √n), of the mean m and the standard deviation s of the logarithms
    of n rounds' ratios, and the 97.5 % quantile t of Student's distribution with n - 1 degrees.
    """
    value = statistics.median(first) / statistics.median(second)
    if len(first) < 2:
        return value, None, None
    from scipy.special import stdtrit

    logs = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    half = float(stdtrit(len(logs) - 1, 0.975)) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    return value, math.exp(mean - half), math.exp(mean + half)


def once(
    command: Sequence[str],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Record:
    """Runs a process whose last line is a record, and returns that.

    Args:
      command: The process.
      folder: Where it runs.
      environment: Its variables.
      limit: Seconds after which it and its children are killed.

    Raises:
      Failed: If it ended otherwise, or did not end; with the end of what it said.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    problem = ""
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        problem = f"took longer than {limit:.0f} s and was stopped"
    finally:
        if process.poll() is None:  # after an interrupt, too
            os.killpg(process.pid, signal.SIGKILL)
            out, said = process.communicate()
    try:
        if not problem and not process.returncode:
            return json.loads(out.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        pass
    problem = problem or f"ended with status {process.returncode} and no record"
    shown = " ".join(" ".join(said.splitlines()[-5:]).split())
    raise Failed(f"{problem}: {shown[-1000:]}", f"{said}\n{out}")


def processor() -> str:
    """Returns the name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = " with AMX" if "amx_tile" in flags else ""
    return f"{len(names)} x {names[0]}{extra}" if names else platform.processor()
