"""Commands that make a model or judge one: train, eval, export, convert."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.cli.common import (
    command_line,
    config_of,
    export_command,
    refuse_several,
    show_next,
    together,
    write_json,
)
from jaxft.errors import ConfigError

if TYPE_CHECKING:
    from jaxft.config import RunConfig


def train(options: argparse.Namespace) -> int:
    """Fine-tunes a model."""
    if options.print_config:
        from jaxft.config import describe

        print(describe(config_of(options, validate=False)))
        return 0
    with together(options):
        config = config_of(options, training=True)
        from jaxft.programs.trainer import train

        result = train(
            config, resume=options.resume, overwrite=options.overwrite, profile=options.profile
        )
    if not result.exit_code:
        show_next(_after_training(config))
    return result.exit_code


def _after_training(config: "RunConfig") -> list[str]:
    """Returns the commands that take a finished run further."""
    from jaxft.workdir.workdir import absolute

    workdir = absolute(config.train.workdir)
    evaluate = command_line("eval", config=workdir / "config.json", checkpoint=workdir)
    held_out = config.data.validation or config.eval.datasets or config.eval.retention
    return [*([evaluate] if held_out else []), export_command(workdir)]


def evaluate(options: argparse.Namespace) -> int:
    """Evaluates a model, a checkpoint or an export, or compares two."""
    with together(options):
        _evaluate(options)
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    config = config_of(options, validate=False)  # --checkpoint may stand in for model.path
    from jaxft import distributed
    from jaxft.compiled.layout import check_outputs
    from jaxft.programs import evaluation, tables
    from jaxft.programs.comparison import compare
    from jaxft.workdir.workdir import absolute

    if options.compare and options.checkpoint:
        raise ConfigError("--compare names both models already; leave --checkpoint out.")
    if distributed.is_first():
        check_outputs(output=options.output)
    if options.compare:
        a, b = evaluation.evaluate_pair(
            config, *options.compare, step=options.step, base=options.base
        )
        results, differences = {"a": a, "b": b}, compare(a, b)
    else:
        found = evaluation.evaluate(
            config, options.checkpoint, step=options.step, base=options.base
        )
        results = {"results": found}
        differences = None
    if not distributed.is_first():
        return
    if differences is None:
        tables.print_evaluation(results["results"], config)
    else:
        name_a, name_b = options.compare
        tables.print_comparison(differences, name_a, name_b, config)
    if options.output:
        write_json(options.output, tables.record(results, differences, config=config))
    checkpoint = absolute(options.checkpoint)
    if options.checkpoint and (checkpoint / "checkpoints").is_dir():
        show_next([export_command(checkpoint)])


def export(options: argparse.Namespace) -> int:
    """Writes a Hugging Face folder."""
    refuse_several("export")
    from jaxft.programs.exporter import export

    folder = export(
        options.checkpoint,
        options.output,
        step=options.step,
        base=options.base,
        merge=options.merge,
        dtype=options.dtype,
        overwrite=options.overwrite,
        verify=options.verify,
    )
    print(f"Wrote {folder}.")
    has_template = (folder / "chat_template.jinja").is_file()
    show_next([command_line("chat" if has_template else "generate", model=Path(options.output))])
    return 0


def convert(options: argparse.Namespace) -> int:
    """Writes a model in another type, or says how it fits."""
    refuse_several("convert")
    if options.check == bool(options.output):
        raise ConfigError("Give --check or --output FOLDER. See `jaxft convert --help`.")
    if options.check and (options.dtype or options.overwrite):
        raise ConfigError("--check writes nothing: it takes no --dtype and no --overwrite.")
    if options.check:
        from jaxft.programs.conversion import check, describe

        found = check(options.model, revision=options.revision)
        print(describe(found))
        return 0 if found.fits else 1
    from jaxft.programs.exporter import export
    from jaxft.workdir.source import find_source

    if find_source(options.model, revision=options.revision).is_adapter:
        raise ConfigError(
            f"{options.model} is an adapter, which has no other type. To write its model with it: "
            f"jaxft export --merge --checkpoint={options.model} --output={options.output}"
        )
    folder = export(
        options.model,
        options.output,
        revision=options.revision,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    print(f"Wrote {folder}.")
    return 0
