"""The two errors that end a run with one line in place of a traceback, and how a library's message becomes one line.

Every module of the project uses them; `run_from_command_line` turns them into exit codes.
"""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names it and says what to do.

    Raised before training, and before anything is written: exit code 2.
    """


class RunError(Exception):
    """A run that has started cannot continue. The message is one line that says why: exit code 1."""


def one_line(error):
    """The message of an exception as one line of at most 300 characters, to be quoted in one of our own messages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def reason(error):
    """The type and the message of a library's exception as one line: "OSError: no space left on device"."""
    return f"{type(error).__name__}: {one_line(error)}"
