"""JSON read so that nothing in it is lost in silence, and in pieces where a file is one value."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

READ_CHARACTERS = 1 << 20
"""Characters that are read at once."""

_DIGITS = 4300
"""Digits of the longest integer that Python converts."""


class JsonError(ValueError):
    """An error in some JSON text; the message is the end of a sentence.

    Attributes:
      line: Line of the text, from 1, where it is known.
    """

    def __init__(self, problem: str, line: int = 1):
        super().__init__(problem)
        self.line = line


class _Decoder:
    """A JSON decoder that notes what Python's would pass over."""

    def __init__(self) -> None:
        self.problem = ""
        self._fast = json.JSONDecoder(object_pairs_hook=self._object)
        self._slow = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def decode(self, text: str, position: int) -> tuple[Any, int]:
        """Returns the value that begins at a position, and where it ends; `problem` tells more.

        Raises:
          JSONDecodeError: If it is not JSON, or not all of it.
          JsonError: If it is nested too deeply to be read.
        """
        self.problem = ""
        try:
            return self._fast.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer with more digits than Python converts
            self.problem = ""
            return self._slow.raw_decode(text, position)
        except RecursionError:
            raise JsonError("it is nested too deeply") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs) and not self.problem:
            names = [name for name, _ in pairs]
            repeated = next(name for name in names if names.count(name) > 1)
            self.problem = f"key {repeated!r} occurs twice in one object"
        return value

    def _integer(self, digits: str) -> int:
        if len(digits) <= _DIGITS:
            return int(digits)
        self.problem = self.problem or f"an integer of {len(digits):,} digits"
        return 0


_decoder = _Decoder()


def loads(text: str) -> Any:
    """Returns the value of a text.

    Raises:
      JsonError: If it is not JSON, or an object has a key twice, or a number or the nesting is
        beyond what can be read.
    """
    begin = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        value, end = _decoder.decode(text, begin)
    except json.JSONDecodeError as error:
        raise JsonError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except JsonError as error:
        raise JsonError(f"JSON that cannot be read: {error}") from error
    if rest := text[end:].lstrip():
        raise JsonError(f"broken JSON: {rest[:20]!r} follows the value at column {end + 1}")
    if _decoder.problem:
        raise JsonError(_decoder.problem)
    return value


class JsonText:
    """Parses one value after another out of JSON text that arrives in pieces.

    Attributes:
      line: Line of the next character, from 1.
    """

    def __init__(self, pieces: Iterable[str]):
        self._pieces = iter(pieces)
        self._buffer = ""
        self._position = 0
        self._decoder = _Decoder()
        self.line = 1

    def _read(self) -> bool:
        """Adds to what is buffered at least as much again, so that long values cost no square."""
        pieces = [self._buffer[self._position :]]
        wanted = max(READ_CHARACTERS, len(pieces[0]))
        read = 0
        for piece in self._pieces:
            pieces.append(piece)
            read += len(piece)
            if read >= wanted:
                break
        if read:
            self._buffer, self._position = "".join(pieces), 0
        return read > 0

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def peek(self) -> str:
        """Returns the next character that is no white space; '' at the end."""
        while True:
            position = self._position
            while position < len(self._buffer) and self._buffer[position] in " \t\r\n":
                position += 1
            self._advance(position)
            if position < len(self._buffer):
                return self._buffer[position]
            if not self._read():
                return ""

    def skip(self, character: str) -> None:
        """Steps over a character that `peek` returned, or raises."""
        if self.peek() != character:
            raise JsonError(f"expected {character!r}", self.line)
        self._advance(self._position + 1)

    def items(self) -> Iterator[tuple[Any, int, str]]:
        """Yields the items of the list that comes next, as `value` returns them."""
        for _ in self._members("[", "]"):
            yield self.value()

    def names(self) -> Iterator[str]:
        """Yields the names of the object that comes next; the caller takes each value."""
        seen: set[str] = set()
        for _ in self._members("{", "}"):
            name = self._decode()
            if not isinstance(name, str):
                raise JsonError("expected the name of a member in quotes", self.line)
            if name in seen:
                raise JsonError(f"key {name!r} occurs twice in one object", self.line)
            seen.add(name)
            self.skip(":")
            yield name

    def end(self) -> None:
        """Raises if anything is left."""
        if self.peek():
            raise JsonError(
                "more follows after the first value; write one object a line, or all of them in "
                "one list",
                self.line,
            )

    def _members(self, opening: str, closing: str) -> Iterator[None]:
        """Yields before each member of a list or an object, which the caller then takes."""
        self.skip(opening)
        character = self.peek()
        while character != closing:
            if not character:
                raise JsonError("the file ends too early", self.line)
            yield
            character = self.peek()
            if character == ",":
                self.skip(",")
                character = self.peek()
                if character in (",", closing):
                    raise JsonError(f"expected a value behind ',', not {character!r}", self.line)
            elif character and character != closing:
                raise JsonError(f"expected ',' or {closing!r} behind a value", self.line)
        self.skip(closing)

    def value(self) -> tuple[Any, int, str]:
        """Returns the value that comes next, the line where it begins and what is wrong with it."""
        self.peek()
        line = self.line
        value = self._decode()
        return value, line, self._decoder.problem

    def _decode(self) -> Any:
        while True:
            try:
                value, end = self._decoder.decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                if self._read():
                    continue
                self._advance(error.pos)
                raise JsonError(error.msg, self.line) from error
            except JsonError as error:
                raise JsonError(str(error), self.line) from error
            if end == len(self._buffer) and self._read():
                continue
            self._advance(end)
            return value
