"""Running what may fail, hang or take the device down, so that the rest of a run goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch

T = TypeVar("T")


class DeviceLostError(Exception):
    """The device refuses all further work; only a new process can go on."""


@dataclass(frozen=True)
class Failure:
    """Why something gave no result, in one line. `lasting`: another attempt would take long, or fail to import, again."""

    reason: str
    lasting: bool = False


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block after `seconds`; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(action: Callable[[], T], seconds: float) -> T | Failure:
    """The result of `action`, or a Failure where it raises or takes too long."""
    try:
        with time_limit(seconds):
            return action()
    except Exception as error:  # whatever a library raises, the run goes on
        text = " ".join(str(error).split())[:300]
        return Failure(f"failed: {type(error).__name__}: {text}", isinstance(error, TimeoutError | ImportError))


def check_device(device: torch.device) -> None:
    """Raise DeviceLostError where an earlier error has made the device unusable for this process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(str(error).splitlines()[0]) from error
