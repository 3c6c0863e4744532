"""Lines of results: a JSON object for each measurement."""

import json
from pathlib import Path
from typing import Any


def put(record: dict[str, Any], output: Path | None) -> dict[str, Any]:
    """Prints a line, appends it to the file if there is one, and returns the record."""
    print(json.dumps(record), flush=True)
    append(record, output)
    return record


def append(record: dict[str, Any], output: Path | None) -> None:
    """Appends a line to the file if there is one."""
    if output:
        with output.open("a") as file:
            file.write(json.dumps(record) + "\n")
