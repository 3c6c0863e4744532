"""`python -m jaxft.service.generator --socket=PATH`: generates text until it is told to end."""

import argparse
from pathlib import Path

from jaxft.errors import JaxftError
from jaxft.hardware import huge_pages


def main() -> None:
    """Runs the generator as the command line says."""
    options = _options()
    huge_pages.start_again_with_them()
    from jaxft.service.generator.running import run

    try:
        run(options)
    except JaxftError as error:
        raise SystemExit(str(error)) from error


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jaxft.service.generator", description=__doc__)
    add = parser.add_argument
    add("--socket", type=Path, required=True, help="path of the unix socket")
    add("--models", type=int, default=4, help="whole models held at a time")
    add("--rows", type=int, default=32, help="texts that a model continues at a time")
    add("--texts", type=int, default=256, help="texts that wait or are under way at a time")
    add("--dtypes", default="float32", help="float32, mixed or bfloat16")
    add("--quantise", default="", help="codes of the layers' weights, such as nf4")
    add("--idle", type=float, default=0, help="minutes without a request after which it ends")
    add("--parent", type=int, default=0, help="process id; when that process is gone, it ends")
    options = parser.parse_args()
    for name in ("models", "rows", "texts"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    return options


if __name__ == "__main__":
    main()
