"""Ctrl-C and SIGTERM: one handler sets a flag, and the loops that must not stop in the middle of a step read it.

Outside of `deferred` a signal raises KeyboardInterrupt at once. Within it, the training loop calls `check` after each
step and the evaluation after each batch.
"""

import os
import signal
import threading
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
received = 0  # the signal that has come in; 0: none. One for the process, as its signal handlers are.
_deferring = False


def _note(number, frame):
    """The handler. A second SIGINT ends the process at once.

    A second SIGTERM does not: a cluster sends it to every process of a job, and a launcher passes its own on as well.
    """
    global received
    if received:
        if number == signal.SIGINT:
            os._exit(128 + number)
        return
    received = number
    if not _deferring:
        raise KeyboardInterrupt


@contextmanager
def handled():
    """Handle the signals here within this block; afterwards whoever handled them before does so again.

    In another thread than the main one, where Python allows no handlers, the signals stay with the main thread.
    """
    global received
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred():
    """Let a signal only set the flag within this block, which reads it with `check` where it can stop.

    Raises KeyboardInterrupt after the block if a signal has come in that the block did not read.
    """
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    check()


def check(accelerator=None):
    """Raise KeyboardInterrupt if a signal has come in.

    accelerator: given where all processes of the run call this at the same moment. Then they stop together if any of
    them has received a signal: one that left alone would let the others wait for it forever.
    """
    if anyone_interrupted(accelerator):
        raise KeyboardInterrupt


def anyone_interrupted(accelerator=None):
    """Whether a signal has come in, to this process or, if an accelerator is given, to any process of the run."""
    if accelerator is None or accelerator.num_processes == 1:
        return bool(received)
    import torch  # `study.py` handles signals without it

    return bool(accelerator.reduce(torch.tensor(float(received), device=accelerator.device)).item())


def exit_code():
    """The exit code of a process that a signal has interrupted: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + (received or signal.SIGINT)
