"""Chrome traces of any size: one event at a time, whatever the layout of the JSON, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ..errors import BadInput, explain_mismatch

CHUNK = 1 << 22  # characters read at a time
LONGEST = 1 << 25  # of one event: a longer stretch that does not parse is damage, not an event still to be completed
_SPACE = " \t\r\n"
_AGAIN = "Export the trace again, and let the program end by itself."


class ChromeTrace:
    """The events of one file, and every other entry of its top level in `header` once they have been read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {}
        self._decoder = json.JSONDecoder(strict=False)  # kernel names with control characters are seen
        self._text, self._at, self._before, self._events = "", 0, 0, 0
        self._ended = False

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event. Raises BadInput that says where a missing, truncated or malformed file went wrong."""
        try:
            with self._open() as self._file:
                yield from self._top_level()
        except OSError as error:
            if isinstance(error, gzip.BadGzipFile):
                self._fail(f"damaged gzip data ({error})", "whole gzip data", _AGAIN)
            self._fail(f"{error.strerror or error}", "a file that can be read", "Correct the path.")
        except EOFError:
            self._fail(f"the end of the gzip data after {self._events:,} events", "all of it", _AGAIN)
        except (zlib.error, UnicodeDecodeError, RecursionError) as error:
            self._fail(f"damaged data after {self._events:,} events ({error})", "UTF-8 JSON", _AGAIN)

    def _open(self) -> TextIO:
        with self.path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        if zipped:
            return gzip.open(self.path, "rt", encoding="utf-8")
        return self.path.open(encoding="utf-8")

    def _top_level(self) -> Iterator[dict[str, Any]]:
        first = self._peek()
        if first == "[":
            yield from self._array()
            return
        if first != "{":
            start = self._text[self._at : self._at + 20]
            then = "Pass what torch.profiler's export_chrome_trace wrote."
            self._fail(f"a file that starts with {start!r}" if start else "an empty file", "a Chrome trace", then)
        self._at += 1
        found = False
        while self._peek() != "}":
            key = self._value()
            self._expect(":")
            if not isinstance(key, str):
                self._malformed("a name in quotes before it")
            if key == "traceEvents" and self._peek() == "[":
                found = True
                yield from self._array()
            else:
                self.header[key] = self._value()
            if self._peek() == ",":
                self._at += 1
        if not found:
            then = "Pass what torch.profiler's export_chrome_trace wrote."
            self._fail(f"JSON with the keys {', '.join(self.header) or 'none'}", "traceEvents", then)

    def _array(self) -> Iterator[dict[str, Any]]:
        self._expect("[")
        while self._peek() != "]":
            event = self._value()
            if not isinstance(event, dict):
                self._fail(f"{event!r:.40} as event {self._events + 1:,}", "an object", _AGAIN)
            self._events += 1
            yield event
            if self._peek() == ",":
                self._at += 1
            elif self._peek() != "]":
                self._malformed("a comma or ]")
        self._at += 1

    def _peek(self) -> str:
        """The next character that is not space; "" at the end of a file that has nothing yet."""
        while True:
            while self._at < len(self._text):
                char = self._text[self._at]
                if char not in _SPACE:
                    return char
                self._at += 1
            if not self._more():
                if self._before or self._text:
                    self._cut()
                return ""

    def _value(self) -> Any:
        """The next JSON value, reading on while it is incomplete."""
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # An incomplete value fails at the end of the text, a string at its own start.
                open_string = error.msg.startswith(("Unterminated string", "Invalid \\"))
                incomplete = open_string or error.pos > len(self._text) - 16
                if incomplete and len(self._text) - self._at < LONGEST and self._more():
                    continue
                if incomplete and self._ended:
                    self._cut()
                self._at = error.pos
                self._malformed(error.msg[:1].lower() + error.msg[1:])
            if end > len(self._text) - 4 and self._text[self._at] not in '{["' and self._more():
                continue  # a number may go on, with .5 or e+9
            self._at = end
            return value

    def _more(self) -> bool:
        """Reads on, forgetting what was parsed; False at the end of the file."""
        chunk = self._file.read(CHUNK)
        if not chunk:
            self._ended = True
            return False
        self._before += self._at
        self._text, self._at = self._text[self._at :] + chunk, 0
        return True

    def _expect(self, char: str) -> None:
        if self._peek() != char:
            self._malformed(repr(char))
        self._at += 1

    def _cut(self) -> NoReturn:
        self._fail(f"the end of the file after {self._events:,} whole events", "the closing ] and }", _AGAIN)

    def _malformed(self, wanted: str) -> NoReturn:
        where = f"{self._text[self._at : self._at + 30]!r} at character {self._before + self._at:,}"
        self._fail(f"{where}, after {self._events:,} whole events", f"JSON ({wanted})", _AGAIN)

    def _fail(self, got: str, wanted: str, then: str) -> NoReturn:
        raise BadInput(explain_mismatch(str(self.path), got=got, wanted=wanted, then=then)) from None
