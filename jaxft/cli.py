"""The `jaxft` command: arguments, nothing else. Each command imports what it needs when it runs."""

import argparse
import importlib.metadata
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jaxft
from jaxft.errors import ConfigError, JaxftError, nearest

if TYPE_CHECKING:
    from jaxft.config import RunConfig

_EPILOG = """
Any key of the config can be set by a flag: --config.optim.learning_rate=2e-5.
All keys with their meaning: jaxft train --print_config.
"""

_SEARCH_ONLY = ("count", "jobs", "budget")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 for wrong usage.

    What a signal stopped has 128 and its number, as in a shell, though training has saved its step:
    130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except JaxftError as error:
        for problem in error.problems:
            print(f"jaxft: {problem}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough, such as `| head`; nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, OSError) as error:
        from jaxft.hardware.devices import shortage

        if not (said := shortage(error)):
            raise
        print(f"jaxft: {said} See what else uses memory here: free -h.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxft: stopped.", file=sys.stderr, flush=True)
        # A thread that is writing a checkpoint must not hold up who wants out now: what is
        # incomplete is ignored later.
        os._exit(130)


def _run(arguments: list[str]) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 2
    options.overrides = _overrides(rest, options)
    return options.run(options)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as the rest of jaxft does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See `{self.prog} --help`.")


class _Formatter(argparse.HelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        unsaid = action.default in (None, "", argparse.SUPPRESS) or action.default is False
        if unsaid or "default" in (text or ""):
            return text
        return f"{text} (default: %(default)s)"


class _Version(argparse.Action):
    """Prints versions without starting jax."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"jaxft {jaxft.__version__}, jax {importlib.metadata.version('jax')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxft", description=jaxft.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of jaxft and jax")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable, text: str, *, config: bool) -> argparse.ArgumentParser:
        epilog = _EPILOG if config else None
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        sub.set_defaults(run=run, takes_config=config, parser=sub)
        if config:
            sub.add_argument(
                "--config", default="", metavar="FILE", help=".py, .yaml or .json; default: none"
            )
        return sub

    train = command("train", _train, "Fine-tune a model.", config=True)
    train.add_argument("--resume", action="store_true", help="continue the run in train.workdir")
    train.add_argument("--overwrite", action="store_true", help="delete that run first")
    _add_processes(train)
    train.add_argument(
        "--print_config", action="store_true", help="show every key with its meaning, and stop"
    )

    evaluate = command("eval", _eval, "Evaluate a model, checkpoint or export.", config=True)
    evaluate.add_argument(
        "--checkpoint", default="", metavar="PATH", help="default: the config's model.path"
    )
    evaluate.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, paired")
    evaluate.add_argument("--output", default="", metavar="FILE", help="write results as JSON too")
    _add_step(evaluate)
    _add_processes(evaluate)

    generate = command("generate", _generate, "Continue texts or answer questions.", config=False)
    _add_model(generate, max_new_tokens=128)
    generate.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; else lines of stdin"
    )
    generate.add_argument(
        "--messages", default="", metavar="FILE", help="JSON or JSONL, as training data has them"
    )
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the text")

    chat = command("chat", _chat, "Talk with a model in the terminal.", config=False)
    _add_model(chat, max_new_tokens=1024)

    export = command("export", _export, "Write a Hugging Face folder.", config=False)
    export.add_argument("--checkpoint", required=True, metavar="PATH", help="workdir or checkpoint")
    export.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes")
    export.add_argument(
        "--dtype", default="", help="of every tensor, such as bfloat16; default: as stored"
    )
    export.add_argument("--overwrite", action="store_true", help="replace the folder")
    export.add_argument("--verify", action="store_true", help="load it again, compare logits")
    _add_step(export)

    convert = command(
        "convert", _convert, "Write a model in another type, or say how it fits.", config=False
    )
    convert.add_argument("model", metavar="MODEL", help="folder or repository id")
    convert.add_argument("--check", action="store_true", help="every tensor, no weights read")
    convert.add_argument("--output", default="", metavar="FOLDER", help="where it goes")
    convert.add_argument(
        "--dtype", default="", help="of every tensor, such as bfloat16; default: as stored"
    )
    convert.add_argument(
        "--revision", default="", help="branch, tag or commit; default: the main one"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace the folder")

    command("data", _data, "Show what the data is and what is trained.", config=True)
    shardings = command("shardings", _shardings, "Show where each array would live.", config=True)
    shardings.add_argument(
        "--devices", type=int, metavar="N", help="on so many made-up CPU devices"
    )
    shardings.add_argument(
        "--collectives", action="store_true", help="compile the training step: what is exchanged"
    )
    shardings.add_argument("--html", default="", metavar="FILE", help="write a page with pictures")
    shardings.add_argument("--output", default="", metavar="FILE", help="write it as JSON too")
    _add_plan(command("plan", _plan, "What a run would cost on TPUs or GPUs.", config=True))
    command("doctor", _doctor, "Check versions, devices, disk and hub.", config=True)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="folder, id or workdir")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--tools", default="", metavar="FILE", help="JSON list of functions")
    parser.add_argument(
        "--max_new_tokens", type=int, default=max_new_tokens, metavar="N", help="longest answer"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: most likely token"
    )
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="0: all tokens")
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="share of probability that is kept"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random draws")
    parser.add_argument(
        "--dtypes",
        default="float32",
        choices=("float32", "mixed", "bfloat16"),
        help="bfloat16 takes half the memory",
    )
    _add_step(parser)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--topology",
        action="append",
        metavar="SLICE",
        help="v5e:4x4, v5p-64, 2xv5e:16x16, h100:64, or local; may be repeated",
    )
    plan.add_argument(
        "--strategy", action="append", metavar="NAME", help="repeatable; default: the config's"
    )
    plan.add_argument("--search", action="store_true", help="look for the fastest way to run")
    plan.add_argument("--no_eval", action="store_true", help="leave the evaluation step out")
    plan.add_argument(
        "--no_remedies", action="store_true", help="try no changes where the run does not fit"
    )
    plan.add_argument(
        "--prices", default="", metavar="FILE", help="TOML; default: jaxft's own table"
    )
    plan.add_argument(
        "--cache",
        default="",
        metavar="FOLDER",
        help="of compiled programs, or off; default: the usual",
    )
    plan.add_argument("--count", type=int, default=8, help="candidates that a search compiles")
    plan.add_argument(
        "--jobs", type=int, default=0, help="processes of a search; 0: a core each, 8 at most"
    )
    plan.add_argument("--budget", type=float, default=480.0, help="seconds for a search")
    plan.add_argument(
        "--output", default="", metavar="FILE", help="write the best found as .py or .yaml"
    )
    plan.add_argument("--json", default="", metavar="FILE", help="write all as JSON")
    plan.add_argument("--html", default="", metavar="FILE", help="write a page with pictures")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", default="best", help="checkpoint of a workdir: best (default), latest or a number"
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several hosts",
        "Start the same command on each host. On Cloud TPU, SLURM, Open MPI and in Kubernetes jobs "
        "they find each other; elsewhere give all three.",
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="of process 0; default: as found"
    )
    group.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="how many there are; default: as found",
    )
    group.add_argument(
        "--process", type=int, default=-1, metavar="I", help="this one, from 0; default: as found"
    )


def _together(options: argparse.Namespace) -> AbstractContextManager[None]:
    from jaxft import distributed

    return distributed.together(
        coordinator=options.coordinator,
        processes=options.processes,
        process=options.process,
    )


def _refuse_several(command: str) -> None:
    from jaxft import distributed

    distributed.refuse_several(command)


def _overrides(rest: list[str], options: argparse.Namespace) -> list[str]:
    known = [name for action in options.parser._actions for name in action.option_strings]
    if options.takes_config and rest:
        from jaxft.flags import take_overrides

        return take_overrides(rest, known)
    if rest:
        raise ConfigError([f"Unknown argument {word!r}.{nearest(word, known)}" for word in rest])
    return []


def _config(options: argparse.Namespace, **checks: bool):
    from jaxft.flags import read_config

    return read_config(options.config, options.overrides, **checks)


def _train(options: argparse.Namespace) -> int:
    if options.print_config:
        from jaxft.config import describe

        print(describe(_config(options, validate=False)))
        return 0
    with _together(options):
        config = _config(options, training=True)
        from jaxft.programs.trainer import train

        result = train(config, resume=options.resume, overwrite=options.overwrite)
    if not result.exit_code:
        _show_next(_after_training(config))
    return result.exit_code


def _after_training(config: "RunConfig") -> list[str]:
    """Returns the commands that take a finished run further."""
    from jaxft.workdir.workdir import absolute

    workdir = absolute(config.train.workdir)
    evaluate = _command("eval", config=workdir / "config.json", checkpoint=workdir)
    held_out = config.data.validation or config.eval.datasets or config.eval.retention
    return [*([evaluate] if held_out else []), _export_command(workdir)]


def _export_command(workdir: Path) -> str:
    output = workdir.parent / f"{workdir.name}-model"
    return _command("export", checkpoint=workdir, output=output) + " --verify"


def _command(name: str, **flags: Path) -> str:
    """Returns a command as it can be pasted into a shell."""
    return " ".join(
        ["jaxft", name, *(shlex.quote(f"--{flag}={value}") for flag, value in flags.items())]
    )


def _show_next(commands: Sequence[str]) -> None:
    from jaxft.console import log

    log("\n".join(["Next:", *(f"  {command}" for command in commands)]))


def _eval(options: argparse.Namespace) -> int:
    with _together(options):
        _evaluate(options)
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    config = _config(options, validate=False)  # --checkpoint may stand in for model.path
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
        a, b = evaluation.evaluate_pair(config, *options.compare, step=options.step)
        results, differences = {"a": a, "b": b}, compare(a, b)
    else:
        results = {"results": evaluation.evaluate(config, options.checkpoint, step=options.step)}
        differences = None
    if not distributed.is_first():
        return
    if differences is None:
        tables.print_evaluation(results["results"], config)
    else:
        name_a, name_b = options.compare
        tables.print_comparison(differences, name_a, name_b, config)
    if options.output:
        _write_json(options.output, tables.record(results, differences, config=config))
    checkpoint = absolute(options.checkpoint)
    if options.checkpoint and (checkpoint / "checkpoints").is_dir():
        _show_next([_export_command(checkpoint)])


def _generate(options: argparse.Namespace) -> int:
    _refuse_several("generate")
    if options.raw and (options.system or options.tools or options.messages):
        raise ConfigError("--raw continues a text: it takes no --system, --tools or --messages.")
    if options.prompt and options.messages:
        raise ConfigError("--prompt and --messages both say what to ask; give one.")
    from jaxft.programs import questions

    tools = questions.read_tools(options.tools) if options.tools else None
    texts, asked = [], []
    if options.messages:
        asked = questions.from_file(options.messages, system=options.system, tools=tools)
    else:
        texts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not options.raw and not options.messages:
        asked = questions.from_prompts(texts, system=options.system, tools=tools)
    sampling = _sampling(options)
    model = jaxft.load(options.model, step=options.step, dtypes=options.dtypes)
    needs_template = options.messages or options.system or tools
    template = getattr(model.tokenizer, "chat_template", None)  # there may be no tokenizer
    if options.raw or not (template or needs_template):
        asked = []
    if asked:
        answers = model.generate_from_ids(
            [question.prompt_ids(model) for question in asked],
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
        )
        lines = [f"{q.text}\n  {answer}" for q, answer in zip(asked, answers, strict=True)]
    else:
        answers = model.generate(
            texts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
        lines = [text + answer for text, answer in zip(texts, answers, strict=True)]
    for line in lines:
        print(line)
    return 0


def _chat(options: argparse.Namespace) -> int:
    _refuse_several("chat")
    from jaxft.programs import questions, terminal

    tools = questions.read_tools(options.tools) if options.tools else None
    sampling = _sampling(options)
    model = jaxft.load(options.model, step=options.step, dtypes=options.dtypes)
    terminal.run(
        terminal.Chat(
            model,
            system=options.system,
            tools=tools,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
        )
    )
    return 0


def _sampling(options: argparse.Namespace):
    from jaxft.programs.generate import Sampling

    if options.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens={options.max_new_tokens}; expected at least 1.")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    if not sampling.temperature and (sampling.top_k or sampling.top_p < 1):
        raise ConfigError(
            "--top_k and --top_p limit what is drawn, and --temperature=0 draws nothing; set "
            "--temperature=1 or another above 0."
        )
    return sampling


def _export(options: argparse.Namespace) -> int:
    _refuse_several("export")
    from jaxft.programs.exporter import export

    folder = export(
        options.checkpoint,
        options.output,
        step=options.step,
        dtype=options.dtype,
        overwrite=options.overwrite,
        verify=options.verify,
    )
    print(f"Wrote {folder}.")
    has_template = (folder / "chat_template.jinja").is_file()
    _show_next([_command("chat" if has_template else "generate", model=Path(options.output))])
    return 0


def _convert(options: argparse.Namespace) -> int:
    _refuse_several("convert")
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

    folder = export(
        options.model,
        options.output,
        revision=options.revision,
        dtype=options.dtype,
        overwrite=options.overwrite,
    )
    print(f"Wrote {folder}.")
    return 0


def _data(options: argparse.Namespace) -> int:
    config = _config(options)
    from jaxft.console import log, stdout
    from jaxft.data.inspect import inspect
    from jaxft.programs.description import context_of, load_model_tokenizer
    from jaxft.programs.evaluation import named_sources
    from jaxft.workdir.source import find_source

    source = find_source(config.model.path, revision=config.model.revision, weights=False)
    tokenizer, _ = load_model_tokenizer(source, config.model)
    held_out = config.data.validation or config.eval.datasets or config.eval.retention
    sources = named_sources(config) if held_out else {}
    report = inspect(
        config,
        tokenizer,
        sources=sources,
        context=context_of(source),
        units=config.objective.objective.units,
        on_progress=log,
    )
    stdout.print(report)
    return 1 if any(item.refusal for item in report.sets) else 0


def _write_json(file: str, value: Any) -> None:
    from jaxft.files import write_json

    write_json(Path(file), value)
    print(f"Wrote {file}.")


def _shardings(options: argparse.Namespace) -> int:
    from jaxft.compiled import layout

    config = _config(options)

    layout.check_outputs(html=options.html, output=options.output)
    devices = None if options.devices is None else layout.cpu_devices(options.devices)
    found = layout.describe_run(config, devices=devices, compiled=options.collectives)
    layout.print_description(found)
    if options.output:
        _write_json(options.output, layout.record(found))
    if options.html:
        from jaxft.compiled.layout_page import write_page

        print(f"Wrote {write_page(options.html, found)}.")
    return 0


def _plan(options: argparse.Namespace) -> int:
    topologies = _listed(options.topology or [])
    if not topologies:
        raise ConfigError("Name one or more slices: --topology=v5e:4x4. See `jaxft plan --help`.")
    if options.output and not options.search:
        raise ConfigError("--output takes the config of a search; add --search.")
    if options.output and not options.output.endswith((".py", ".yaml", ".yml")):
        raise ConfigError(f"--output={options.output}: a config file ends in .py, .yaml or .yml.")
    plan = options.parser
    set_for_search = [n for n in _SEARCH_ONLY if getattr(options, n) != plan.get_default(n)]
    if set_for_search and not options.search:
        raise ConfigError(f"--{set_for_search[0]} is for a search; add --search.")
    if options.count < 1 or options.jobs < 0 or not options.budget > 0:
        raise ConfigError("--count is 1 or more, --jobs 0 or more, --budget more than 0 seconds.")
    config = _config(options)
    from jaxft.compiled.layout import check_outputs
    from jaxft.console import log
    from jaxft.planner import command
    from jaxft.planner.topology import LOCAL, use_compiler_alone

    check_outputs(html=options.html, json=options.json, output=options.output)
    if options.output and len(topologies) > 1:
        raise ConfigError("--output takes the best of one search; name one --topology.")
    if topologies != [LOCAL]:
        use_compiler_alone()
    request = command.Request(
        topologies=topologies,
        strategies=_listed(options.strategy or []),
        search=options.search,
        evaluation=not options.no_eval,
        remedies=not options.no_remedies,
        prices=options.prices,
        cache=options.cache,
        count=options.count,
        jobs=options.jobs,
        budget=options.budget,
    )
    plans, searches = command.plan(config, request, on_log=log)
    from jaxft.planner import show

    for found in searches:
        show.print_search(found)
    show.print_plans(plans)
    if options.json:
        _write_json(options.json, show.record(plans, searches))
    if options.html:
        from jaxft.planner.page import write_page

        print(f"Wrote {write_page(options.html, plans, searches)}.")
    if options.output:
        print(f"Wrote {command.write_config(options.output, config, searches[0])}.")
    return 0 if plans and all(plan.fits for plan in plans) else 1


def _listed(values: Sequence[str]) -> list[str]:
    """Returns what was given by flags that may be repeated, or once with commas."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def _doctor(options: argparse.Namespace) -> int:
    named = options.config or options.overrides
    config = _config(options, validate=False) if named else None
    from jaxft.programs.doctor import print_checks, run_doctor

    return print_checks(run_doctor(config))
