"""Shares what the programs that make pictures of pages begin and end with."""

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def begin(description: str | None, default: Path) -> tuple[str, Path]:
    """Returns the program that draws pages, and where pictures go by `--output`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=default)
    output = parser.parse_args().output
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("Chromium is needed: it draws the pages.")
    return chromium, output


def check_size(picture: Path, largest: int) -> None:
    """Says how many bytes a picture has; ends the program if there are too many."""
    size = picture.stat().st_size
    print(f"{picture}: {size:,} bytes")
    if size > largest:
        sys.exit(f"{picture} has more than {largest:,} bytes.")
