"""A process that has imported the libraries, and forks a fresh process for each script that the tests start.

Importing torch and transformers takes seconds; most scripts of the tests run for less. `conftest.py` starts it as

    python tests/fork_server.py LISTENER ALIVE MODULE...

LISTENER: a listening socket. ALIVE: a pipe that is closed when the tests end; then this process ends too.

A client sends the new process's stdin, stdout and stderr over a connection, and {"argv", "cwd", "environ"} as one line
of JSON. It gets a line with the process's id and, when the process has ended, a line with its exit code (negative: the
signal that ended it). If the client leaves before, the process is killed.

The process runs argv[0], or the module after "-m", as Python would; it has its own memory, signals and end. Only what a
library reads from the environment when it is imported is this process's.
"""

import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys


def serve(listener, alive):
    """Answer requests as long as the tests live. Returns in each new process, with what it is to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    while alive not in select.select([listener, alive], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(alive)
            request = watch(connection)
            if request is not None:
                return request
            break
        connection.close()
    os._exit(0)


def watch(connection):
    """Fork the process that is asked for and tell its end. Returns in that process, with the request."""
    line, streams, *_ = socket.recv_fds(connection, 2**16, 3)
    while not line.endswith(b"\n"):
        line += connection.recv(2**16)
    request = json.loads(line)
    child_ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (connection, child_ended, wake):
            each.close()
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
            os.close(fd)
        return request
    for fd in streams:
        os.close(fd)
    connection.sendall(b"%d\n" % pid)
    ended = 0
    while not ended:
        if connection in select.select([connection, child_ended], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
            return None
        ended, status = os.waitpid(pid, os.WNOHANG)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    return None


def become(request):
    """Run the script of a request as the main program of this process."""
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    random.seed()
    sys.argv = request["argv"]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = request["cwd"]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in sys.argv[3:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is here stays: a collection in a new process need not copy its pages
    become(serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
