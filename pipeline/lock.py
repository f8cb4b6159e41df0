"""One folder, one writer: a lock for as long as a run, an evaluation or a comparison writes to its folder.

The lock is a file that names its process and host, and that its process touches every few seconds (filelock's
SoftFileLease). So it works on disks that several machines share, too. A killed process's lock is taken over: at once on
the same machine, and from another machine when it has not been touched for LEASE seconds.
"""

import os
import socket
import time
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from pipeline.errors import InputError, RunError, reason

LOCK = ".lock"
LEASE = 60.0  # seconds; a process that cannot touch its lock for so long, such as a suspended one, loses it
HEARTBEAT = 2.0  # seconds between touches
_lost = set()  # folders whose lock this process has lost


@contextmanager
def only_writer(folder, flag="--save_dir"):
    """Hold the lock of `folder` within this block. The folder is created for it, and removed again if it stays empty.

    flag: the argument that an error message names. Raises InputError if another process holds the lock, with its host,
    its process id and since when; or if the folder cannot be created or written to.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.absolute().parents) if not os.path.lexists(path)]
    check_writable(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder / LOCK, f"{flag} {folder}")
    except OSError as error:
        _remove_empty(missing)
        raise InputError(f"{flag} {folder} is not writable ({reason(error)}); choose another folder") from None
    except InputError:
        _remove_empty(missing)
        raise
    try:
        yield
    finally:
        lock.release()
        _remove_empty(missing)


def in_use(folder):
    """Whether another process seems to hold the lock of `folder`, as far as one look can tell.

    Only `only_writer` knows for certain. This is for deciding what to try next.
    """
    holder = _read(Path(folder, LOCK))
    if not holder:
        return False
    if holder["host"] == socket.gethostname() and holder.get("pid", "").isdigit() and not _exists(int(holder["pid"])):
        return False
    return time.time() - holder["touched"] / 1e9 < LEASE


def _exists(pid):
    """Whether this machine has a process of this id, as far as that can be asked."""
    if os.name == "nt":  # there, signal 0 is a Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def check_writable(folder, flag="--save_dir"):
    """Raise InputError unless files can be written to `folder`, or it can be created."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise InputError(f"{flag} {folder}: {nearest} is not a folder; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: {nearest} is not writable; choose another folder")


def _acquire(path, what):
    """The acquired lock. Raises InputError if another process holds it; what: names the folder then."""
    from filelock import SoftFileLease, Timeout

    folder = path.parent.absolute()
    lose = {"on_compromise": lambda _: _lost.add(folder)}  # called in the thread that touches the lock
    lock = SoftFileLease(path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, **lose)
    _lost.discard(folder)
    end, touched = time.monotonic() + LEASE + 2 * HEARTBEAT, None
    while True:
        try:
            lock.acquire(timeout=0)  # takes over the lock of a process of this machine that no longer exists
            break
        except Timeout:
            holder = _read(path)
        # A holder that touches its lock is alive. One on another machine that does not is watched until LEASE is over.
        touched = touched or holder.get("touched")
        if holder and (holder["touched"] != touched or time.monotonic() > end):
            raise InputError(
                f"{what} is in use: process {holder.get('pid', '?')} on {holder.get('host', '?')} has been writing to"
                f" it since {holder.get('since', '?')}; wait until it ends, or choose another folder"
            )
        time.sleep(0.2)
    with open(path, "a", encoding="utf-8") as marker:  # filelock ignores fields that it does not know
        marker.write(f"since={datetime.now().astimezone().isoformat(' ', 'seconds')}\n")
    return lock


def _read(path):
    """The fields of a lock file and when it was touched; {} if it is gone."""
    with suppress(OSError, UnicodeDecodeError):
        fields = dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines() if "=" in line)
        return fields | {"touched": path.stat().st_mtime_ns, "host": fields.get("host", "?").split("?pidns-")[0]}
    return {}


def check_held(path):
    """Raise RunError if this process has lost the lock of a folder above `path`: another one may be writing to it."""
    for folder in _lost:
        if Path(path).absolute().is_relative_to(folder):
            raise RunError(f"{folder} can no longer be written to: its lock was removed or taken over")


def _remove_empty(folders):
    """Remove those of the folders, the innermost first, that are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
