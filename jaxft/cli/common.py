"""Parts that several commands share."""

import argparse
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def together(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Runs a block as one of the processes that the options name."""
    from jaxft import distributed

    return distributed.together(
        coordinator=options.coordinator,
        processes=options.processes,
        process=options.process,
    )


def refuse_several(command: str) -> None:
    """Raises ConfigError if a launcher started several processes of a command that is for one."""
    from jaxft import distributed

    distributed.refuse_several(command)


def config_of(options: argparse.Namespace, **checks: bool):
    """Returns the config that the options name; `checks` as for `flags.read_config`."""
    from jaxft.flags import read_config

    return read_config(options.config, options.overrides, **checks)


def command_line(name: str, **flags: Path) -> str:
    """Returns a command as it can be pasted into a shell."""
    return " ".join(
        ["jaxft", name, *(shlex.quote(f"--{flag}={value}") for flag, value in flags.items())]
    )


def show_next(commands: Sequence[str]) -> None:
    """Names the commands that go on from here."""
    from jaxft.console import log

    log("\n".join(["Next:", *(f"  {command}" for command in commands)]))


def write_json(file: str, value: Any) -> None:
    """Writes a JSON file and says so."""
    from jaxft.files import write_json

    write_json(Path(file), value)
    print(f"Wrote {file}.")


def listed(values: Sequence[str]) -> list[str]:
    """Returns what was given by flags that may be repeated, or once with commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def export_command(workdir: Path) -> str:
    """Returns the command that exports the best checkpoint of a run."""
    from jaxft.models.adapter_files import format_problems
    from jaxft.workdir.source import Source

    source = Source(workdir / "model", workdir / "checkpoints")
    note = source.note
    # An adapter of weights that nobody else has goes nowhere alone.
    alone = (
        note is not None and not note.adaptation.whole and not format_problems(source.architecture)
    )
    output = workdir.parent / f"{workdir.name}-{'adapter' if alone else 'model'}"
    command = command_line("export", checkpoint=workdir, output=output) + " --verify"
    return command if alone or note is None else f"{command} --merge"
