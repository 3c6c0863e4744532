"""The `jaxft` command: arguments, nothing else. Each command imports what it needs when it runs."""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxft.cli.parser import make_parser
from jaxft.errors import ConfigError, JaxftError, nearest
from jaxft.hardware import huge_pages

_COMPUTING = ("train", "eval", "generate", "chat")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure, 2 for wrong usage.

    What a signal stopped has 128 and its number, as in a shell, though training has saved its step:
    130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] and arguments[0] in _COMPUTING:
        huge_pages.start_again_with_them()
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
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if "run" not in options:
        parser.print_help()
        return 2
    options.overrides = _overrides(rest, options)
    return options.run(options)


def _overrides(rest: list[str], options: argparse.Namespace) -> list[str]:
    known = [name for action in options.parser._actions for name in action.option_strings]
    if options.takes_config and rest:
        from jaxft.flags import take_overrides

        return take_overrides(rest, known)
    if rest:
        raise ConfigError([f"Unknown argument {word!r}.{nearest(word, known)}" for word in rest])
    return []
