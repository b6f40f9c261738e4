"""The processes of a run meet before JAX joins them, which aborts a process that waits in vain.

Process 0 listens at the coordinator's port. Every process, process 0 too, connects, tells in one
line of JSON its number and how many it expects, and reads lines until one says that all are there,
or what is wrong. Then the port is free for JAX. The connections stay: JAX waits in vain for a
process that has no devices. When process 0 is killed JAX aborts the others with a dump; a line is
there before, and the end with it, if they hear of it first.
"""

import contextlib
import json
import os
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

# Seconds: for a name that nobody knows (that of a host that has just started may become known), for
# the first words of whoever connects, for those of process 0, and between its reports.
_NAME = 30.0
_WORDS = 5.0
_ANSWER = 15.0
_REPORT = 30.0
_LONGEST = 4096  # bytes of a line

_LEAVING = threading.Event()
_KEPT: list[socket.socket] = []  # process 0's ends, which the system closes when it is gone


@contextlib.contextmanager
def meet(coordinator: str, count: int, index: int, limit: float) -> Iterator[None]:
    """Wait until all processes of a run have met at the coordinator's address.

    Says what it waits for. What is done inside, the others wait for: this process ends, with one
    line and status 2, if another one ends in there. Later it ends, with one line and status 1, if
    process 0 does, until `leave` is called. Args as of multihost.join.

    Raises:
      ValueError: naming what is wrong with the address or the processes, or who has not come.
    """
    host, port = _address(coordinator)
    # JAX would ask a proxy of the environment for the host, which knows nothing of it.
    os.environ["no_grpc_proxy"] = host
    me = f"process {index} of {count} ({socket.gethostname()}, pid {os.getpid()})"
    patience = limit
    if index == 0:
        server = _listen(coordinator, port, me)
        threading.Thread(target=_serve, args=(server, count, limit), daemon=True).start()
        patience = min(limit, _ANSWER)  # it listens already
    connection = _connect(coordinator, (host, port), me, patience)
    _send(connection, {"process": index, "processes": count, "name": me})
    connection.settimeout(_ANSWER)
    fault = _hear(connection, coordinator, me)
    if fault:
        raise ValueError(f"{me} cannot start: {fault}")

    def end_with_others() -> None:
        connection.settimeout(None)
        fault = _hear(connection, coordinator, me)
        if fault:
            _say(f"error: {me} cannot start: {fault}")
            os._exit(2)
        if index == 0:
            return
        with contextlib.suppress(OSError):
            connection.recv(1)  # nothing more is said: it waits for the end of process 0
        if not _LEAVING.is_set():
            _say(
                f"error: {me} cannot go on: process 0 at {coordinator} has ended; see what it has "
                "printed, and start all again"
            )
            os._exit(1)

    threading.Thread(target=end_with_others, daemon=True).start()
    yield
    _send(connection, {"ready": index})


def leave() -> None:
    """Let process 0 end before this process does, from now on."""
    _LEAVING.set()


def _address(coordinator: str) -> tuple[str, int]:
    """Return host and port; IPv6 addresses stand in brackets."""
    name, _, port = coordinator.rpartition(":")
    host = name.removeprefix("[").removesuffix("]")
    known = port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 1 << 16
    if not host or not known or re.search(r"[\s/@\[\]]", host):
        raise ValueError(
            f"--coordinator is {coordinator!r}; expected HOST:PORT of process 0, with a port from "
            "1 to 65535, for example 10.0.0.1:1234"
        )
    return host, int(port)


def _listen(coordinator: str, port: int, me: str) -> socket.socket:
    """Return a socket at this port of all addresses of this host, as JAX will listen."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"--coordinator is {coordinator}, but {me} cannot listen at port {port} "
            f"({os.strerror(error.errno or 0)}); is another process 0 there? Expected a free port: "
            "give another one to all processes"
        ) from None


def _connect(coordinator: str, address: tuple[str, int], me: str, limit: float) -> socket.socket:
    """Return a connection to process 0, which may come later than this process."""
    advice = (
        "expected an address of this host"
        if me.startswith("process 0 ")
        else "start process 0 there, or correct --coordinator"
    )
    start = time.monotonic()
    told = None
    while True:
        left = limit - (time.monotonic() - start)
        try:
            return socket.create_connection(address, timeout=min(max(left, 0.1), _ANSWER))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            patience = min(limit, _NAME) if isinstance(error, socket.gaierror) else limit
        if time.monotonic() - start >= patience:
            raise ValueError(
                f"{me} has not reached process 0 at --coordinator={coordinator} within "
                f"{patience:g} s ({reason}); {advice}"
            )
        if told != reason:
            _say(f"{me} waits for process 0 at {coordinator} ({reason}), {patience:g} s at most")
            told = reason
        time.sleep(0.2)


def _hear(connection: socket.socket, coordinator: str, me: str) -> str:
    """Return "" when process 0 says that all are there, or ready; else what is wrong."""
    try:
        for words in _lines(connection):
            if "fault" in words:
                return words["fault"]
            if "missing" in words:
                _say(f"{me} waits for {words['missing']}, {words['left']} s at most")
            connection.settimeout(_REPORT + _ANSWER)
    except ValueError:
        return (
            f"another program, or another run, answers at {coordinator}; expected process 0: give "
            "another port to all processes"
        )
    except OSError as error:
        return f"process 0 does not answer at {coordinator} ({error.strerror or error})"
    return f"process 0 at {coordinator} has ended; see what it has printed"


def _serve(server: socket.socket, count: int, limit: float) -> None:
    """Take in all processes, and tell each that all are there, and then ready, or what is wrong."""
    start = time.monotonic()
    report = 1.0
    present: dict[int, tuple[socket.socket, str]] = {}
    fault = ""
    server.settimeout(0.2)
    while len(present) < count and not fault:
        try:
            fault = _take_in(server.accept()[0], count, present)
        except TimeoutError:
            pass
        except OSError:  # closed: this process has given up
            return
        for index, (connection, _) in list(present.items()):
            if _has_left(connection):
                del present[index]
        missing = [f"process {index}" for index in range(count) if index not in present]
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" * (len(missing) > 8))
        passed = time.monotonic() - start
        if missing and not fault and passed > limit:
            fault = (
                f"{named} of {count} did not come within {limit:g} s; see what was printed there, "
                "and start all at once, or with a longer --join_timeout"
            )
        elif missing and passed > report:
            report = passed + _REPORT
            for connection, _ in present.values():
                _send(connection, {"missing": named, "left": round(limit - passed)})
    while fault:  # those who are at the door hear it, too
        try:
            _take_in(server.accept()[0], count, present)
        except OSError:
            break
    server.close()
    waiting = dict(present.values())
    for connection in waiting:
        _send(connection, {"fault": fault})
    while waiting and not fault:
        for connection in select.select(list(waiting), [], [])[0]:
            name = waiting.pop(connection)
            if _has_left(connection):
                fault = f"{name} has ended; see what it has printed"
    for connection, _ in present.values():
        _send(connection, {"fault": fault})
        _KEPT.append(connection)


def _take_in(
    connection: socket.socket, count: int, present: dict[int, tuple[socket.socket, str]]
) -> str:
    """Add who connects to those who are present; return what is wrong, or "".

    Others than processes of a run, such as scans of ports, are ignored.
    """
    connection.settimeout(_WORDS)
    try:
        words = next(_lines(connection))
        index = int(words["process"])
        theirs = int(words["processes"])
        name = str(words["name"])
    except (OSError, ValueError, TypeError, KeyError, StopIteration):
        connection.close()
        return ""
    if theirs == count and index in range(count) and index not in present:
        connection.setblocking(False)  # short words alone follow, and _has_left looks
        present[index] = (connection, name)
        _send(connection, {"welcome": index})
        return ""
    if theirs != count:
        fault = f"{name} has --processes={theirs}, process 0 has {count}; start all alike"
    else:
        fault = (
            f"{name} and {present[index][1]} both have --process={index}; expected each number "
            f"from 0 to {count - 1} once"
        )
    _send(connection, {"fault": fault})
    return fault


def _has_left(connection: socket.socket) -> bool:
    """Return whether the other end was closed; nothing else is to be read there."""
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _send(connection: socket.socket, words: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who has left need not know
        connection.sendall(json.dumps(words).encode() + b"\n")


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Yield the lines of the other end; ValueError if they are none of ours."""
    content = b""
    while piece := connection.recv(4096):
        content += piece
        while b"\n" in content:
            line, _, content = content.partition(b"\n")
            try:
                words = json.loads(line)
            except RecursionError:
                words = None
            if not isinstance(words, dict):
                raise ValueError("no object")
            yield words
        if len(content) > _LONGEST:
            break
    if content:
        raise ValueError("no line")
