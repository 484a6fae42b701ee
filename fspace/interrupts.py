"""Ctrl-C that ends a fit between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """The first Ctrl-C waits here until training asks for it with `check`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.waiting, self.pressed = False, False

    def check(self) -> None:
        """Raise the KeyboardInterrupt that waits, if one does."""
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            signal.default_int_handler(number, frame)
        self.waiting = self.pressed = True


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Ctrl-C does not cut through a library inside: torch, say, would be left with gradients switched off.

    Only in the main thread, and only where Python's own handler is in place: a program that has other ideas about
    Ctrl-C keeps them.
    """
    held = Interrupts()
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield held
        return
    signal.signal(signal.SIGINT, held._press)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
