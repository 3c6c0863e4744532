"""Commands and their options."""

import argparse
import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import NoReturn

import jaxft
from jaxft.cli import looking, running, serving, talking
from jaxft.config import ModelConfig
from jaxft.errors import ConfigError

_EPILOG = """
Any key of the config can be set by a flag: --config.optim.learning_rate=2e-5.
All keys with their meaning: jaxft train --print_config.
"""


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


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; each sets `run` to what runs it."""
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

    train = command("train", running.train, "Fine-tune a model.", config=True)
    train.add_argument("--resume", action="store_true", help="continue the run in train.workdir")
    train.add_argument("--overwrite", action="store_true", help="delete that run first")
    train.add_argument(
        "--profile",
        type=_number_from_one,
        nargs="?",
        const=3,
        default=0,
        metavar="STEPS",
        help="trace so many steps and show what took longest; default: none, without a number 3",
    )
    _add_processes(train)
    train.add_argument(
        "--print_config", action="store_true", help="show every key with its meaning, and stop"
    )

    evaluate = command(
        "eval", running.evaluate, "Evaluate a model, checkpoint or export.", config=True
    )
    evaluate.add_argument(
        "--checkpoint", default="", metavar="PATH", help="default: the config's model.path"
    )
    evaluate.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, paired")
    evaluate.add_argument("--output", default="", metavar="FILE", help="write results as JSON too")
    _add_step(evaluate)
    _add_base(evaluate)
    _add_processes(evaluate)

    generate = command(
        "generate", talking.generate, "Continue texts or answer questions.", config=False
    )
    _add_model(generate, max_new_tokens=128)
    generate.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; else lines of stdin"
    )
    generate.add_argument(
        "--messages", default="", metavar="FILE", help="JSON or JSONL, as training data has them"
    )
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the text")

    chat = command("chat", talking.chat, "Talk with a model in the terminal.", config=False)
    _add_model(chat, max_new_tokens=1024)

    export = command(
        "export", running.export, "Write a Hugging Face folder, or an adapter's.", config=False
    )
    export.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="workdir, checkpoint or adapter"
    )
    export.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes")
    export.add_argument(
        "--dtype", default="", help="of every tensor, such as bfloat16; default: as stored"
    )
    export.add_argument(
        "--merge",
        action="store_true",
        help="write the whole model with its adapter in it; default: the adapter, as PEFT has it",
    )
    export.add_argument("--overwrite", action="store_true", help="replace the folder")
    export.add_argument("--verify", action="store_true", help="load it again, compare logits")
    _add_step(export)
    _add_base(export, "; or the multimodal model of which a run holds the text, if that has moved")

    convert = command(
        "convert",
        running.convert,
        "Write a model in another type, or say how it fits.",
        config=False,
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

    command("data", looking.data, "Show what the data is and what is trained.", config=True)
    shardings = command(
        "shardings", looking.shardings, "Show where each array would live.", config=True
    )
    shardings.add_argument(
        "--devices", type=int, metavar="N", help="on so many made-up CPU devices"
    )
    shardings.add_argument(
        "--collectives", action="store_true", help="compile the training step: what is exchanged"
    )
    shardings.add_argument("--html", default="", metavar="FILE", help="write a page with pictures")
    shardings.add_argument("--output", default="", metavar="FILE", help="write it as JSON too")
    _add_plan(command("plan", looking.plan, "What a run would cost on TPUs or GPUs.", config=True))
    _add_serve(command("serve", serving.serve, "Serve OpenAI's fine-tuning calls.", config=False))
    command("doctor", looking.doctor, "Check versions, devices, disk and hub.", config=True)
    return parser


def _number_from_one(text: str) -> int:
    """Returns a number of steps."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _choices(key: str) -> tuple[str, ...]:
    """Returns what a key of the model may be."""
    [found] = (f for f in dataclasses.fields(ModelConfig) if f.name == key)
    return found.metadata["choices"]


def _add_model(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="folder, id, adapter or workdir"
    )
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
    _add_numbers(parser)
    _add_step(parser)
    _add_base(parser)


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    """Adds how a model that generates holds its weights."""
    parser.add_argument(
        "--dtypes",
        default="float32",
        choices=_choices("dtypes"),
        help="bfloat16 takes half the memory",
    )
    parser.add_argument(
        "--quantise",
        default="",
        choices=_choices("quantise"),
        help="hold the layers' weights in codes: nf4 takes a quarter of bfloat16",
    )


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
    plan.add_argument(
        "--fit",
        default="",
        metavar="MODEL",
        help="the smallest slices for full, LoRA and QLoRA tuning of a model, by estimate",
    )
    plan.add_argument(
        "--chip", action="append", metavar="NAME", help="for --fit; repeatable; default: several"
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


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument(
        "--models",
        action="append",
        metavar="PATHS",
        help="base models: folders, folders of folders, ids, name=path; repeatable, or commas",
    )
    serve.add_argument("--workdir", default="service", metavar="FOLDER", help="all that is kept")
    serve.add_argument("--host", default="127.0.0.1", help="address; others than this need a token")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free")
    serve.add_argument(
        "--allow_host", action="append", metavar="NAME", help="by which it may be addressed too"
    )
    serve.add_argument("--new_token", default="", metavar="NAME", help="make a token, and stop")
    serve.add_argument("--drop_token", default="", metavar="NAME", help="delete a token, and stop")
    serve.add_argument(
        "--database", default="", metavar="URL", help="default: SQLite in the workdir"
    )
    serve.add_argument(
        "--executor",
        default="local",
        choices=("local", "slurm", "jobset"),
        help="what runs jobs: this machine, or a cluster's scheduler",
    )
    serve.add_argument(
        "--executor_option", action="append", metavar="KEY=VALUE", help="of slurm and jobset"
    )
    serve.add_argument(
        "--device_set", action="append", metavar="0,1", help="of one job; repeatable; default: all"
    )
    serve.add_argument(
        "--topology", default="", metavar="SLICE", help="that jobs run on elsewhere, such as v5e-8"
    )
    serve.add_argument(
        "--most_jobs", type=int, default=8, metavar="N", help="handed to a scheduler at a time"
    )
    serve.add_argument(
        "--keep_unfinished",
        type=int,
        default=0,
        metavar="DAYS",
        help="for checkpoints of cancelled and failed jobs; 0: until they are deleted",
    )
    serve.add_argument(
        "--organization",
        default="local",
        metavar="NAME",
        help="in the names of tuned models, and in the id of their owner",
    )
    serve.add_argument("--webhook", action="append", metavar="URL", help="told how jobs end")
    serve.add_argument(
        "--webhook_secret", default="", metavar="FILE", help="signs that; default: unsigned"
    )
    serve.add_argument(
        "--requests_per_minute", type=int, default=0, metavar="N", help="of one token; 0: any"
    )
    serve.add_argument(
        "--generate_on", default="", metavar="DEVICES", help="cpu, or 3: where text is generated"
    )
    _add_numbers(serve)
    serve.add_argument(
        "--idle",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help="without a request for text, after which models leave the memory; 0: they stay",
    )


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", default="best", help="checkpoint of a workdir: best (default), latest or a number"
    )


def _add_base(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "--base",
        default="",
        metavar="PATH",
        help=f"model that an adapter is made for; default: as the adapter names it{more}",
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
