"""Compares two variants of a benchmark: jaxft as it is with a change, or jaxft with PyTorch.

    .venv/bin/python benchmarks/compare.py --rounds 5 --of "" --over checkout=../before \
        train_step --shape 15m --steps 4
    .venv/bin/python benchmarks/compare.py --of objective.chunk=256 --over "" train_step --shape 15m
    .venv/bin/python benchmarks/compare.py --of model.remat=dots --over torch=python3.11 \
        train_step --shape 15m --set model.dtypes=bfloat16

The benchmark is a file of this folder with its options. A variant is what it has beside them, in
words: keys of the run (`objective.chunk=256`), further options (`--rows=8`), `checkout=FOLDER`
(jaxft and the benchmark as they are there) or `torch=PYTHON` (PyTorch's side, by that Python);
empty for nothing; the same twice shows what chance does. Both take turns, each measurement in a
process of its own. Prints their lines, and the ratio of the medians with its 95 % interval, by
Student's t of the rounds' log ratios: above 1 the first has the larger figure, which is better of
tokens per second and worse of seconds.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import turns

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """One side of a comparison.

    Attributes:
      flags: Options beside those of both.
      checkout: Folder of the jaxft that is measured.
      torch: Python of PyTorch's side; empty for jaxft.
    """

    flags: tuple[str, ...] = ()
    checkout: Path = ROOT
    torch: str = ""

    def command(self, benchmark: str, arguments: Sequence[str]) -> list[str]:
        """Returns the command of one measurement.

        Args:
          benchmark: Name of its file, without the ending.
          arguments: Its options.
        """
        script = self.checkout / "benchmarks" / f"{benchmark}.py"
        if not script.is_file():
            raise SystemExit(f"There is no benchmark {script}.")
        of_torch = ["--torch-python", self.torch] if self.torch else []
        system = "torch" if self.torch else "jaxft"
        flags = [*arguments, *self.flags, *of_torch, "--once", system]
        return [sys.executable, str(script), *flags]

    def measure(self, benchmark: str, arguments: Sequence[str]) -> turns.Record:
        """Returns the record of one measurement."""
        environment = {**os.environ, "PYTHONPATH": str(self.checkout)}
        command = self.command(benchmark, arguments)
        return turns.once(command, folder=self.checkout, environment=environment)


def variant_of(text: str) -> Variant:
    """Reads the words of a variant."""
    flags, own = [], {}
    for word in shlex.split(text):
        key, equals, value = word.partition("=")
        if key in ("checkout", "torch"):
            own[key] = value
        elif word.startswith("--"):
            flags.append(word)
        elif equals:
            flags += ["--set", word]
        else:
            raise SystemExit(
                f"{word!r} of a variant is neither KEY=VALUE nor an option such as --rows=8."
            )
    checkout = Path(own["checkout"]).resolve() if "checkout" in own else ROOT
    return Variant(tuple(flags), checkout, own.get("torch", ""))


def named(of: str, over: str) -> tuple[str, str]:
    """Returns what the two sides are called."""
    first, second = (text or "as it is" for text in (of, over))
    return first, f"{second}, again" if first == second else second


def main() -> None:
    """Lets two variants of a benchmark take turns."""
    parser = argparse.ArgumentParser(description="Compares two variants of a benchmark.")
    parser.add_argument("--of", required=True, help="the variant whose figure is divided")
    parser.add_argument("--over", required=True, help="the variant that it is divided by")
    parser.add_argument("--figure", default=turns.FIGURE, help="what is compared of their records")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--output", type=Path, help="append the lines to this file too")
    parser.add_argument("benchmark", help="such as train_step")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its options")
    options = parser.parse_args()

    def side(name: str, text: str) -> Callable[[], turns.Record]:
        variant = variant_of(text)
        variant.command(options.benchmark, ())  # refuses what is not there before anything runs
        return lambda: variant.measure(options.benchmark, options.arguments) | {"variant": name}

    texts = (options.of, options.over)
    turns.take_turns(
        {name: side(name, text) for name, text in zip(named(*texts), texts, strict=True)},
        rounds=options.rounds,
        output=options.output,
        about={"benchmark": options.benchmark, "arguments": shlex.join(options.arguments)},
        figure=options.figure,
    )


if __name__ == "__main__":
    main()
