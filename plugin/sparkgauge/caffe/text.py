"""Prototxt to messages and back; every error names the file, the line and the name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format

from sparkgauge.caffe import schema
from sparkgauge.errors import ConfigurationError

DEEPEST_NESTING = 50
"""Levels of blocks; a solver with an inline net has six."""

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\f\v]+|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
    |(?P<mark>[{}<>\[\]:,;])
    |(?P<word>[^\s\#"'{}<>\[\]:,;]+)""",
    re.VERBOSE,
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CLOSING = {"{": "}", "<": ">"}

_OLD = {
    "layers": "V1 layers are not read: convert the file with Caffe's upgrade_net_proto_text.",
    "solver_type": "Write type: with the solver's name instead (SGD, Nesterov, AdaGrad, RMSProp, AdaDelta, Adam).",
    "input": "Write a layer of type Input instead.",
    "input_dim": "Write a layer of type Input instead.",
    "input_shape": "Write a layer of type Input instead.",
}
"""What to do about fields that Caffe itself calls deprecated."""

Place = tuple[str | int, ...]
"""``("layer", 3, "convolution_param", 0)``: names and numbers of occurrence, in turn."""


@dataclass(frozen=True)
class Prototxt:
    """A parsed file."""

    message: Any
    file: str
    lines: Mapping[Place, int]
    """The line (from 1) at which each field stands."""

    def where(self, *place: str | int) -> str:
        """Return ``file:line`` of ``("layer", 3, "top", 0)``, or of the innermost part of it that the file has."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.file}:{self.lines[place]}" if place else self.file


def parse(source: str, kind: Any = schema.NetParameter, *, file: str = "<text>") -> Prototxt:
    """Return the message of class ``kind`` that ``source`` describes; ConfigurationError says file, line and name."""
    lines = _Scanner(source, file).scan(kind.DESCRIPTOR)
    message = kind()
    try:
        text_format.Parse(source, message)
    except text_format.ParseError as error:
        raise _bad_value(error, file) from None
    return Prototxt(message, file, lines)


def print_message(message: Any) -> str:
    """Return ``message`` as prototxt; parsing it gives an equal message."""
    return str(text_format.MessageToString(message))


def suggestion(name: str, allowed: Any) -> str:
    """Return ``, did you mean 'X'?`` where something allowed is close, else an empty text."""
    by_lower = {str(one).lower(): one for one in allowed}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""


def _bad_value(error: Any, file: str) -> ConfigurationError:
    reason = re.sub(r"^(\d+:\d+ : )?('.*?': )?", "", str(error), flags=re.DOTALL).rstrip(".")
    line = error.GetLine()
    where = f"{file}:{line}" if line else file
    for pattern, expected in _REASONS.items():
        if found := re.fullmatch(pattern, reason, re.DOTALL):
            return ConfigurationError(
                "Malformed prototxt", expected=found.expand(expected), actual=found["actual"], where=where
            )
    return ConfigurationError(f"Malformed prototxt: {reason}", where=where)


_REASONS = {
    r"Couldn't parse (?P<kind>\w+): (?P<actual>.*)": r"a value of type \g<kind>",
    r"Value out of range: (?P<actual>.*)": "a number in the field's range",
    r"Expected (?P<kind>\w+) but found: (?P<actual>.*)": r"a value of type \g<kind>",
    r'Enum type "caffe\.(?P<kind>\w+)" has no value named (?P<actual>.*)': r"a name of \g<kind>",
}
"""What protobuf's parser says, and what it expected then."""


class _Scanner:
    """Walks through the text once, checking names against the schema and noting lines; values are protobuf's job."""

    def __init__(self, source: str, file: str) -> None:
        self._file, self._line, self._at = file, 1, 0
        self._tokens = list(self._split(source))
        self.lines: dict[Place, int] = {}

    def scan(self, descriptor: Any) -> dict[Place, int]:
        """Return the line of every field."""
        self._block(descriptor, (), None)
        return self.lines

    def _split(self, source: str) -> Any:
        position = 0
        while position < len(source):
            match = _TOKEN.match(source, position)
            if match is None:
                raise self._error("an unfinished text", self._line, expected="a closing quote on the same line")
            if match.lastgroup == "newline":
                self._line += 1
            elif match.lastgroup != "space":
                yield str(match.lastgroup), match.group(), self._line
            position = match.end()

    def _block(self, descriptor: Any, place: Place, closing: str | None) -> None:
        """Read fields up to ``closing``, or to the end of the text."""
        seen: dict[str, int] = {}
        if len(place) > 2 * DEEPEST_NESTING:
            raise self._error("deeper nesting", self._here(), expected=f"at most {DEEPEST_NESTING} levels of blocks")
        while (token := self._next()) is not None:
            if token[1] == closing and token[0] == "mark":
                return
            self._field(token, descriptor, place, seen)
        if closing is not None:
            raise self._error("the end of the file", self._here(), expected=f"{closing!r} to close the block")

    def _field(self, token: tuple[str, str, int], descriptor: Any, place: Place, seen: dict[str, int]) -> None:
        name, field = token[1], self._known(token, descriptor)
        child = (*place, name, seen.get(name, 0))
        seen[name] = seen.get(name, 0) + 1
        self.lines[child] = token[2]
        self._accept(":")
        self._value(field, child, seen)
        if not self._accept(","):
            self._accept(";")

    def _known(self, token: tuple[str, str, int], descriptor: Any) -> Any:
        kind, name, line = token
        if kind != "word" or not _NAME.fullmatch(name):
            raise self._error(repr(name), line, expected="the name of a field")
        if name in _OLD and (name == "layers" or name not in descriptor.fields_by_name):
            raise ConfigurationError(
                f"Field {name!r} of {descriptor.name} is the old format",
                where=f"{self._file}:{line}",
                hint=_OLD[name],
            )
        field = descriptor.fields_by_name.get(name)
        if field is None:
            close = suggestion(name, descriptor.fields_by_name)
            raise ConfigurationError(
                f"Unknown or unsupported field {name!r} of {descriptor.name}{close}", where=f"{self._file}:{line}"
            )
        return field

    def _value(self, field: Any, place: Place, seen: dict[str, int]) -> None:
        token = self._next()
        if token is None:
            raise self._error("the end of the file", self._here(), expected=f"a value of {field.name!r}")
        kind, word, line = token
        if kind == "mark" and word == "[":
            self._list(field, place, seen)
        elif kind == "mark" and word in _CLOSING and field.message_type is not None:
            self._block(field.message_type, place, _CLOSING[word])
        elif kind == "mark" or field.message_type is not None:
            wanted = "a block in braces" if field.message_type is not None else "a value"
            raise self._error(repr(word), line, expected=f"{wanted} of {field.name!r}")
        elif kind == "string":
            while self._peek() == "string":
                self._next()

    def _list(self, field: Any, place: Place, seen: dict[str, int]) -> None:
        """Read ``[a, b]``; further blocks are further occurrences of the field."""
        seen[field.name] -= 1
        while not self._accept("]"):
            number = seen[field.name]
            seen[field.name] += 1
            place = (*place[:-1], number)
            self.lines[place] = self._here()
            self._value(field, place, seen)
            self._accept(",")

    def _next(self) -> tuple[str, str, int] | None:
        if self._at == len(self._tokens):
            return None
        self._at += 1
        token: tuple[str, str, int] = self._tokens[self._at - 1]
        return token

    def _peek(self) -> str | None:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else None

    def _accept(self, mark: str) -> bool:
        found = self._peek() == "mark" and self._tokens[self._at][1] == mark
        self._at += found
        return found

    def _here(self) -> int:
        return self._tokens[self._at][2] if self._at < len(self._tokens) else self._line

    def _error(self, actual: str, line: int, *, expected: str) -> ConfigurationError:
        return ConfigurationError("Malformed prototxt", expected=expected, actual=actual, where=f"{self._file}:{line}")
