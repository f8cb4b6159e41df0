"""What `accelerate launch` starts in the tests in place of a script, as

    python tests/forked.py SCRIPT ARGUMENT...

The fork server at $FORK_SERVER runs the script instead, with this process's streams and environment. Signals are passed
on to it, and this process ends as it does. So the launcher is the real one, and only the libraries' imports are saved.
"""

import json
import os
import signal
import socket
import sys


def request(address, argv, cwd, environ, streams):
    """Ask the fork server at an address for a process; returns the connection to it, see fork_server.py."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    line = json.dumps({"argv": argv, "cwd": cwd, "environ": environ}).encode() + b"\n"
    sent = socket.send_fds(connection, [line], streams)
    connection.sendall(line[sent:])
    return connection


def read_number(connection, timeout=None):
    """The number in the next line that comes over a connection."""
    connection.settimeout(timeout)
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise EOFError("the fork server has ended")
        line += byte
    return int(line)


def main():
    address = os.environ.pop("FORK_SERVER")
    connection = request(address, sys.argv[1:], os.getcwd(), dict(os.environ), [0, 1, 2])
    pid = read_number(connection)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = read_number(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
