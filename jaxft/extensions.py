"""Parts that are chosen by name: a module of jaxft's, or any importable one of the user's."""

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from jaxft.errors import ConfigError, JaxftError, nearest

# Folders of Python, of installed packages and of jaxft.
_NOT_THEIRS = (
    *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")),
    os.path.dirname(__file__),
)


def load_named(name: str, known: Mapping[str, str], *, kind: str, attribute: str) -> Any:
    """Returns what a module defines under a fixed name.

    Modules in the working folder are importable, as for `python -m`.

    Args:
      name: One of the known names, or an importable module.
      known: Module of each built-in part, by name.
      kind: What such a part is, in errors: `strategy`.
      attribute: What the module defines: `STRATEGY`.

    Raises:
      ConfigError: If there is no such module, it cannot be imported or defines no such thing.
    """
    module = known.get(name, name)
    built_in = ", ".join(known)
    try:
        with _working_folder_on_path():
            found = importlib.import_module(module)
    except Exception as error:  # a module of the user's raises whatever it likes
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if not name or (missing and f"{module}.".startswith(f"{missing}.")):
            raise ConfigError(
                f"Unknown {kind} {name!r}; known: {built_in}, or an importable module of "
                f"yours that defines {attribute}.{nearest(name, known)}"
            ) from error
        said = str(error) if isinstance(error, JaxftError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{kind} {name!r} cannot be used: {_place(error)}{said.removesuffix('.')}."
        ) from error
    value = getattr(found, attribute, None)
    # By name: the type itself may need what is heavy to import.
    if type(value).__name__ != kind.capitalize():
        file = getattr(found, "__file__", None) or "built into Python"
        raise ConfigError(
            f"{kind} {name!r} cannot be used: the module ({file}) defines no {attribute} of the "
            f"type {kind.capitalize()}. Built in: {built_in}."
        )
    return value


def _place(error: Exception) -> str:
    """Returns `file:line: ` of the user's own code that failed; of any code if none is theirs."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: "
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")
    ]
    theirs = [f for f in frames if not f.filename.startswith(_NOT_THEIRS)]
    last = (theirs or frames)[-1]
    return f"{last.filename}:{last.lineno}: "


@contextlib.contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Lets modules of the working folder be imported; at the end, so that none hides another."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
