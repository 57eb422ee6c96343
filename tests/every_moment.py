"""Ctrl-C at moments that are counted: those in code that is watched where the interpreter looks for signals."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
from dis import Bytecode, opname
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import opero

if TYPE_CHECKING:
    from types import CodeType, FrameType

OPERO = (str(Path(opero.__file__).parent), contextlib.__file__)
EXECUTORS = (str(Path(concurrent.futures.__file__).parent), threading.__file__)
# After these, CPython runs the handlers of signals that have come; after calls, if what was called is not Python code.
_LOOKS_AFTER = ("RESUME", "JUMP_BACKWARD")
_LOOKS_AFTER_C = ("CALL", "CALL_FUNCTION_EX")
# Where an error goes, that of a call, too; after that the interpreter looks at nothing else first.
_HANDLES_AN_ERROR = ("PUSH_EXC_INFO", "COPY", "RERAISE")


# By their identity, with each: to compare code takes as long as it is.
_handlers: dict[int, tuple[CodeType, list[Any]]] = {}


def _handler(code: CodeType, offset: int) -> int | None:
    """Where an error of the instruction goes.

    The trace function raises at the next one, and what leaves a block by ``return`` is not in it any more.
    """
    if id(code) not in _handlers:
        _handlers[id(code)] = code, Bytecode(code).exception_entries
    _, entries = _handlers[id(code)]
    return next((entry.target for entry in entries if entry.start <= offset < entry.end), None)


class Presser:
    """Presses Ctrl-C when the interpreter looks for the ``moment``-th time, and again some calls and returns later."""

    def __init__(self, moment: int, again_after: int | None = None, *, watched: tuple[str, ...] = OPERO) -> None:
        self._watched = watched
        self._left = moment
        self._left_until_again = again_after
        self._latest: dict[FrameType, tuple[int, int]] = {}
        self._python_calls = 0
        self._process = os.getpid()
        self.has_pressed = False

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    # No generator: code of contextlib is watched, and what is pressed here would be none of opero's business.
    def __exit__(self, *_raised: object) -> None:
        sys.setprofile(None)
        sys.settrace(self._before)

    def _press(self) -> None:
        # A worker that was forked has all of this, too.
        if os.getpid() == self._process:
            os.kill(self._process, signal.SIGINT)

    def _enter(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        self._python_calls += 1
        if self.has_pressed or not frame.f_code.co_filename.startswith(self._watched):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event != "opcode" or self.has_pressed:
            return self._step
        code, offset = frame.f_code, frame.f_lasti
        latest, calls_then = self._latest.get(frame, (0, 0))
        self._latest[frame] = offset, self._python_calls
        name = opname[code.co_code[latest]]
        if opname[code.co_code[offset]] in _HANDLES_AN_ERROR:
            return self._step
        looks = name in _LOOKS_AFTER or (name in _LOOKS_AFTER_C and calls_then == self._python_calls)
        if looks and _handler(code, latest) == _handler(code, offset):
            self._left -= 1
            if self._left < 0:
                self._latest.clear()
                self.has_pressed = True
                if self._left_until_again is not None:
                    sys.setprofile(self._count_until_again)
                self._press()
        return self._step

    def _count_until_again(self, frame: FrameType, _event: str, _arg: Any) -> None:
        assert self._left_until_again is not None
        # A generator that is freed before it has begun runs no code; it is only shown as if it did.
        has_not_begun = opname[frame.f_code.co_code[frame.f_lasti]] == "RETURN_GENERATOR"
        if frame.f_code.co_filename == __file__ or has_not_begun:
            return
        if self._left_until_again == 0:
            sys.setprofile(None)
            self._press()
        self._left_until_again -= 1
