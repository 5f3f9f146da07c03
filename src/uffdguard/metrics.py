"""The state as metrics, for Prometheus: its text format, a file of it, and an HTTP server that asks at each scrape."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import socketserver
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client import CollectorRegistry, MetricsHandler, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from uffdguard import __version__, state
from uffdguard.conditions import CONDITIONS
from uffdguard.errors import Failure, one_line
from uffdguard.policy import Backend, Mode
from uffdguard.steps import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.core import Metric

    from uffdguard.state import Status

#: What ends the server.
ENDS = {signal.SIGINT, signal.SIGTERM}
#: Seconds for which a client may keep the server waiting.
PATIENCE = 10
PAGE = b'<!DOCTYPE html><title>uffdguard</title><a href="/metrics">metrics</a>\n'


class StateCollector(Collector):
    """Asks for the state whenever metrics are asked for."""

    def collect(self) -> Iterator[Metric]:
        """Give the metrics of now."""
        try:
            status = state.status()
        except (Failure, OSError) as error:
            log.warning("%s", error)
            yield from of_status(None)
        else:
            yield from of_status(status)


def of_status(status: Status | None) -> Iterator[Metric]:
    """Give the metrics of STATUS; None: it cannot be read.

    Where it is not known whether a policy is in force, ``uffdguard_in_force`` is left out. Where none is in force there
    are no counters: a 0 in between would be taken for a restart from 0.
    """
    kernel = status.kernel if status else os.uname().release
    build = {"version": __version__, "kernel": one_line(kernel)}
    yield InfoMetricFamily("uffdguard_build", "The version of uffdguard, and the kernel it runs on.", build)
    if status and status.answers is not None:
        yield _gauge("in_force", "Whether a policy was seen to be in force.", status.in_force)
    if status:
        modes = {str(word): status.mode is word for word in Mode}
        yield _gauges("mode", "Which mode is set.", "mode", modes)
        backends = {str(word): status.backend is word for word in Backend}
        yield _gauges("backend", "What carries the policy out.", "backend", backends)
    yield _gauge("problems", "Number of things amiss, as status lists them.", len(status.problems) if status else 1)
    if status is None:
        yield _conditions({"policy-answers": False})
        return
    files = {word: word == status.interface for word in get_args(state.Interface)}
    yield _gauges("interface_file", "What the interface file is.", "state", files)
    if status.native_knob is not None:
        yield _gauge("native_knob", "The value of vm.unprivileged_userfaultfd.", status.native_knob)
    yield _gauge("drift", "Whether the native knob does not fit the mode.", status.drift)
    if status.in_force or status.failing:
        holds = {
            condition.name: condition.name not in status.failing
            for condition in CONDITIONS
            if (status.backend or Backend.LSM) in condition.backends
        }
        # Where the program that decides is not pinned, status names the damage alone.
        holds["policy-answers"] &= status.in_force
        yield _conditions(holds)
    if status.answers is False:
        return
    yield _gauge("user_mode_only", "Whether UFFD_USER_MODE_ONLY suffices to be allowed.", bool(status.user_mode_only))
    yield _gauge("audit", "Whether refusals are let pass.", bool(status.audit))
    if status.backend is Backend.NATIVE:  # which counts nothing
        return
    yield _gauge("grants", "Processes that have opened /dev/kvm.", status.grants)
    yield _counter("grants_lost", "Grants that could not be recorded.", status.lost)
    yield _counter("hooks_skipped", "Times that the kernel skipped a program of ours.", status.skipped)
    decisions = CounterMetricFamily(
        "uffdguard_decisions", "Creations of a userfaultfd that were decided.", labels=("verdict", "reason")
    )
    for reason, number in status.decisions.items():
        decisions.add_metric(("allowed" if reason.allowed else "refused", reason), number)
    decisions.add_metric(("refused", "native"), status.native)
    yield decisions
    yield _counter("let_pass", "Refusals that audit let pass.", status.let_pass)
    yield _counter("sysctl_refused", "Writes to sysctls that would undo the policy, refused.", status.sysctl_refused)
    yield _counter("events_suppressed", "Events over the limit, which were only counted.", status.suppressed)


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"uffdguard_{name}", what, value)


def _gauges(name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    found = GaugeMetricFamily(f"uffdguard_{name}", what, labels=(label,))
    for word, value in values.items():
        found.add_metric((word,), value)
    return found


def _conditions(holds: Mapping[str, bool]) -> Metric:
    return _gauges("condition", "Whether what must hold does, for a policy to be in force.", "condition", holds)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"uffdguard_{name}", what, value)


def registry() -> CollectorRegistry:
    """Return a registry of the state alone, without the metrics of this process."""
    found = CollectorRegistry()
    found.register(StateCollector())
    return found


def text() -> str:
    """Return the metrics of now in the text format."""
    return generate_latest(registry()).decode()


def write(path: Path, content: str) -> None:
    """Write a file for everybody to read, so that it is there whole or not at all.

    The directory may be another user's, so the name before it is whole is one that nobody can foresee.

    :raises Failure: it cannot be written.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise Failure(f"{path} is not a regular file", "name the file itself")
    beside = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            beside = Path(file.name)
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        beside.rename(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}", "make it possible and run it again") from error
    finally:
        if beside:
            beside.unlink(missing_ok=True)


class Handler(MetricsHandler):
    """Answers a GET of /metrics, and of / with the way there."""

    timeout = PATIENCE
    server_version = f"uffdguard/{__version__}"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer."""
        match self.path.partition("?")[0]:
            case "/metrics":
                super().do_GET()
            case "/":
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(PAGE)
            case _:
                self.send_error(404)


class Server(socketserver.ThreadingTCPServer):
    """The HTTP server, on an address of either family."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), type("Handler", (Handler,), {"registry": registry()}))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a client that has gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def parse(text: str) -> tuple[str, int]:
    """Return the address and the port of ADDRESS:PORT.

    :raises ValueError: it is none.
    """
    found = re.fullmatch(r"(?:\[([^]]*:[^]]*)\]|([^:]*)):([0-9]{1,5})", text, re.ASCII)
    if not found or int(found[3]) > 65535:
        raise ValueError(text)
    return str(ipaddress.ip_address(found[1] or found[2])), int(found[3])


def serve(address: str, port: int, tell: Callable[[str], object]) -> None:
    """Serve until SIGINT or SIGTERM.

    :param tell: is given the URL once it is served.
    :raises Failure: the address or the port is not to be had.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    host = f"[{address}]" if ":" in address else address
    try:
        server = Server(address, port)
    except OSError as error:
        what = f"cannot listen on {host}:{port}: {error.strerror}"
        raise Failure(what, "choose another address or port") from error
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tell(f"http://{host}:{server.server_address[1]}/metrics")
        signal.sigwait(ENDS)
        server.shutdown()
