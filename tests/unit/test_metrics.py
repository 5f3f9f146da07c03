"""What is exported, to the letter; the file and the HTTP server. A real Prometheus scrapes in tests/vm."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus
import pytest
import rules
from inside import Outcome, forked, uffdguard
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from unit import test_cli

from uffdguard import __version__, cli, metrics, state
from uffdguard.conditions import CONDITIONS
from uffdguard.errors import Failure, one_line
from uffdguard.kernel import native
from uffdguard.policy import WEAKER, Backend, Mode, Reason

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable, Iterator

    from prometheus_client.core import Metric

    from uffdguard.state import Status

ROOT = Path(__file__).parents[2]

STATUS = test_cli.STATUS._replace(
    audit=False,
    drift=False,
    pins=dict.fromkeys(state.PARTS, True),
    skipped=2,
    lost=3,
    interface="served",
    grants=4,
    allowed=30,
    refused=123456,
    decisions=dict.fromkeys(Reason, 0) | {Reason.KVM: 30, Reason.NO_KVM: 123456},
    native=0,
    let_pass=0,
    sysctl_refused=8,
    problems=["one\nthing", "another"],
    failing=["knob-fits"],
)
STOPPED = STATUS._replace(
    in_force=False,
    answers=False,
    mode=None,
    user_mode_only=None,
    native_knob=None,
    problems=[],
    failing=[],
    backend=None,
)
NATIVE = STATUS._replace(backend=Backend.NATIVE, user_mode_only=True, failing=["device-fits"], weaker=WEAKER)

TEXT = f"""\
# HELP uffdguard_build_info The version of uffdguard, and the kernel it runs on.
# TYPE uffdguard_build_info gauge
uffdguard_build_info{{kernel="6.12.1-amd64",version="{__version__}"}} 1.0
# HELP uffdguard_in_force Whether a policy was seen to be in force.
# TYPE uffdguard_in_force gauge
uffdguard_in_force 1.0
# HELP uffdguard_mode Which mode is set.
# TYPE uffdguard_mode gauge
uffdguard_mode{{mode="disabled"}} 0.0
uffdguard_mode{{mode="enabled"}} 0.0
uffdguard_mode{{mode="kvm"}} 1.0
# HELP uffdguard_backend What carries the policy out.
# TYPE uffdguard_backend gauge
uffdguard_backend{{backend="lsm"}} 1.0
uffdguard_backend{{backend="native"}} 0.0
# HELP uffdguard_problems Number of things amiss, as status lists them.
# TYPE uffdguard_problems gauge
uffdguard_problems 2.0
# HELP uffdguard_interface_file What the interface file is.
# TYPE uffdguard_interface_file gauge
uffdguard_interface_file{{state="native"}} 0.0
uffdguard_interface_file{{state="served"}} 1.0
uffdguard_interface_file{{state="dead"}} 0.0
# HELP uffdguard_native_knob The value of vm.unprivileged_userfaultfd.
# TYPE uffdguard_native_knob gauge
uffdguard_native_knob 1.0
# HELP uffdguard_drift Whether the native knob does not fit the mode.
# TYPE uffdguard_drift gauge
uffdguard_drift 0.0
# HELP uffdguard_condition Whether what must hold does, for a policy to be in force.
# TYPE uffdguard_condition gauge
uffdguard_condition{{condition="policy-answers"}} 1.0
uffdguard_condition{{condition="ftrace-enabled"}} 1.0
uffdguard_condition{{condition="guard-attached"}} 1.0
uffdguard_condition{{condition="preemption"}} 1.0
uffdguard_condition{{condition="grants-found"}} 1.0
uffdguard_condition{{condition="pins-complete"}} 1.0
uffdguard_condition{{condition="knob-fits"}} 0.0
uffdguard_condition{{condition="kvm-device"}} 1.0
uffdguard_condition{{condition="native-counted"}} 1.0
uffdguard_condition{{condition="start-complete"}} 1.0
uffdguard_condition{{condition="found-recorded"}} 1.0
uffdguard_condition{{condition="hooks-not-skipped"}} 1.0
uffdguard_condition{{condition="grants-not-lost"}} 1.0
uffdguard_condition{{condition="interface-answers"}} 1.0
uffdguard_condition{{condition="procfs-needed"}} 1.0
# HELP uffdguard_user_mode_only Whether UFFD_USER_MODE_ONLY suffices to be allowed.
# TYPE uffdguard_user_mode_only gauge
uffdguard_user_mode_only 0.0
# HELP uffdguard_audit Whether refusals are let pass.
# TYPE uffdguard_audit gauge
uffdguard_audit 0.0
# HELP uffdguard_grants Processes that have opened /dev/kvm.
# TYPE uffdguard_grants gauge
uffdguard_grants 4.0
# HELP uffdguard_grants_lost_total Grants that could not be recorded.
# TYPE uffdguard_grants_lost_total counter
uffdguard_grants_lost_total 3.0
# HELP uffdguard_hooks_skipped_total Times that the kernel skipped a program of ours.
# TYPE uffdguard_hooks_skipped_total counter
uffdguard_hooks_skipped_total 2.0
# HELP uffdguard_decisions_total Creations of a userfaultfd that were decided.
# TYPE uffdguard_decisions_total counter
uffdguard_decisions_total{{reason="capability",verdict="allowed"}} 0.0
uffdguard_decisions_total{{reason="enabled",verdict="allowed"}} 0.0
uffdguard_decisions_total{{reason="user-mode-only",verdict="allowed"}} 0.0
uffdguard_decisions_total{{reason="kvm",verdict="allowed"}} 30.0
uffdguard_decisions_total{{reason="disabled",verdict="refused"}} 0.0
uffdguard_decisions_total{{reason="no-kvm",verdict="refused"}} 123456.0
uffdguard_decisions_total{{reason="native",verdict="refused"}} 0.0
# HELP uffdguard_let_pass_total Refusals that audit let pass.
# TYPE uffdguard_let_pass_total counter
uffdguard_let_pass_total 0.0
# HELP uffdguard_sysctl_refused_total Writes to sysctls that would undo the policy, refused.
# TYPE uffdguard_sysctl_refused_total counter
uffdguard_sysctl_refused_total 8.0
# HELP uffdguard_events_suppressed_total Events over the limit, which were only counted.
# TYPE uffdguard_events_suppressed_total counter
uffdguard_events_suppressed_total 0.0
"""


def text(status: object) -> str:
    registry = CollectorRegistry()
    registry.register(type("Fake", (), {"collect": lambda _: metrics.of_status(status)})())  # type: ignore[arg-type]
    return generate_latest(registry).decode()


def parsed(text: str) -> dict[tuple[str, ...], float]:
    """Return the value of each sample by its name and the values of its labels."""
    families: Iterable[Metric] = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "need_root", lambda what: None)
    monkeypatch.setattr(state, "status", lambda: STATUS)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["metrics", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_metrics_are_these_to_the_letter(as_root: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert text(STATUS) == TEXT
    assert run(capsys) == (0, TEXT, "")


def test_what_the_kernel_side_is_about_to_tell_is_exported() -> None:
    found = parsed(text(STATUS._replace(audit=True, native=5, let_pass=6, suppressed=7)))
    assert found["uffdguard_audit",] == 1
    assert found["uffdguard_decisions_total", "native", "refused"] == 5
    assert found["uffdguard_let_pass_total",] == 6
    assert found["uffdguard_events_suppressed_total",] == 7


@pytest.mark.parametrize("reason", Reason)
def test_a_decision_is_counted_under_its_verdict_and_reason(reason: Reason) -> None:
    found = parsed(text(STATUS._replace(decisions=dict.fromkeys(Reason, 0) | {reason: 9})))
    decisions = {key[1:]: value for key, value in found.items() if key[0] == "uffdguard_decisions_total"}
    assert [key for key, value in decisions.items() if value] == [(reason, "allowed" if reason.allowed else "refused")]
    assert len(decisions) == len(Reason) + 1


@pytest.mark.parametrize("mode", Mode)
def test_one_mode_is_in_force(mode: Mode) -> None:
    found = parsed(text(STATUS._replace(mode=mode)))
    assert {word: found["uffdguard_mode", word] for word in Mode} == {word: float(word is mode) for word in Mode}


def test_without_a_policy_in_force_there_is_no_mode_and_no_counter() -> None:
    found = parsed(text(STOPPED))
    assert found["uffdguard_in_force",] == 0
    assert [found["uffdguard_mode", word] for word in Mode] == [0, 0, 0]
    gone = ("uffdguard_grants", "uffdguard_condition")
    assert not [name for name, *_ in found if name.endswith("_total") or name.startswith(gone)]


def test_a_policy_that_does_not_answer_has_conditions_and_no_counter() -> None:
    found = parsed(text(STOPPED._replace(reason="it does not", failing=["ftrace-enabled"])))
    conditions = {key[1]: value for key, value in found.items() if key[0] == "uffdguard_condition"}
    assert {name for name, value in conditions.items() if not value} == {"policy-answers", "ftrace-enabled"}
    assert set(conditions) == {condition.name for condition in CONDITIONS if Backend.LSM in condition.backends}
    assert (found["uffdguard_in_force",], [name for name, *_ in found if name.endswith("_total")]) == (0, [])


def test_the_backend_native_has_its_own_conditions_and_no_counter() -> None:
    found = parsed(text(NATIVE))
    conditions = {key[1]: value for key, value in found.items() if key[0] == "uffdguard_condition"}
    assert conditions == {
        "policy-answers": 1, "pins-complete": 1, "knob-fits": 1, "device-fits": 0, "rules-fit": 1, "kvm-device": 1,
        "start-complete": 1, "found-recorded": 1,
    }  # fmt: skip
    assert [name for name, *_ in found if name.endswith("_total")] == []
    assert (found["uffdguard_backend", "native"], found["uffdguard_backend", "lsm"]) == (1, 0)


def test_a_policy_that_could_not_be_asked_has_its_counters_and_is_not_said_to_be_out_of_force() -> None:
    unknown = STATUS._replace(in_force=False, answers=None, reason="it could not be asked", failing=["policy-answers"])
    found, known = parsed(text(unknown)), parsed(text(STATUS._replace(failing=[])))
    assert set(known) - set(found) == {("uffdguard_in_force",)}
    assert {key: value for key, value in found.items() if value != known[key]} == {
        ("uffdguard_condition", "policy-answers"): 0
    }


@pytest.mark.parametrize("error", [Failure("it is\nso", "do that"), PermissionError(1, "no")])
def test_a_state_that_cannot_be_read_is_unknown_and_a_problem(
    as_root: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail() -> Status:
        raise error

    monkeypatch.setattr(state, "status", fail)
    status, out, _ = run(capsys)
    found = parsed(out)
    assert (status, found["uffdguard_problems",], found["uffdguard_condition", "policy-answers"]) == (0, 1, 0)
    assert ("uffdguard_in_force",) not in found
    assert [record.getMessage() for record in caplog.records] == [str(error)]


def test_a_hostile_name_of_the_kernel_is_a_value_and_no_more() -> None:
    name = '6.12"} 1\nuffdguard_in_force 0\\\x1b[31m\r\x00\udcff'
    found = text(STATUS._replace(kernel=name))
    assert len(found.splitlines()) == len(TEXT.splitlines())
    assert parsed(found)["uffdguard_in_force",] == 1
    assert ("uffdguard_build_info", one_line(name), __version__) in parsed(found)


@pytest.mark.parametrize(
    "status", [STATUS, STOPPED, NATIVE, STATUS._replace(answers=None), None, STATUS._replace(audit=True, native=5)]
)
def test_promtool_has_nothing_to_say_about_the_metrics(status: object) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=text(status), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_who_is_not_root_is_told_so_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    line = "uffdguard: only root can see the state of the policy; run it as root, e.g. with sudo\n"
    assert run(capsys) == (1, "", line)
    assert run(capsys, "--listen", "127.0.0.1:0") == (1, "", line)


def test_without_the_library_one_line_names_the_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("uffdguard.metrics")
    monkeypatch.delitem(sys.modules, "uffdguard.metrics")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    status, out, err = run(capsys)
    assert (status, out, err) == (
        1,
        "",
        "uffdguard: prometheus_client is missing; apt install python3-prometheus-client\n",
    )


# The file.


def test_the_file_is_for_everybody_to_read_whatever_the_umask(
    as_root: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "uffdguard.prom"
    before = os.umask(0o077)
    try:
        assert run(capsys, "--textfile", str(file)) == (0, "", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert file.read_text() == TEXT
    assert list(tmp_path.iterdir()) == [file]


def test_who_reads_the_file_meanwhile_sees_the_older_or_the_newer(tmp_path: Path) -> None:
    file = tmp_path / "uffdguard.prom"
    metrics.write(file, "older")
    with file.open() as older:
        metrics.write(file, "newer")
        assert (older.read(), file.read_text()) == ("older", "newer")


def test_nothing_stays_of_a_file_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "uffdguard.prom"
    metrics.write(file, "older")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", fail)
    with pytest.raises(Failure, match=r"cannot write .*uffdguard.prom: No space left on device"):
        metrics.write(file, "newer")
    assert (list(tmp_path.iterdir()), file.read_text()) == ([file], "older")


def test_a_link_that_somebody_put_there_is_not_followed_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    for path in (tmp_path / "link", Path("/dev/null"), tmp_path):
        with pytest.raises(Failure, match="is not a regular file"):
            metrics.write(path, TEXT)
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "link").is_symlink()


def test_a_directory_that_is_not_there_is_one_line(
    as_root: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "--textfile", f"{tmp_path}/no\n/file")
    assert (status, out) == (1, "")
    why = "No such file or directory; make it possible and run it again"
    assert err == f"uffdguard: cannot write {tmp_path}/no\\n/file: {why}\n"


# The server.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9101", ("127.0.0.1", 9101)),
        ("[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:65535", ("fe80::1%eth0", 65535)),
    ],
)
def test_an_address_is_numeric_with_a_port(text: str, expected: tuple[str, int]) -> None:
    assert metrics.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":9101", "9101", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:٩"),
        *("localhost:9101", "*:9101", "1:9101", "::1:9101", "[::1]", "[127.0.0.1]:9101", "[]:9101"),
        *("127.0.0.1:9101\n", "\x1b[::1]:9101"),
    ],
)
def test_what_is_no_address_is_wrong_usage_on_one_line(
    as_root: None, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    status, out, err = run(capsys, "--listen", text)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "is no ADDRESS:PORT such as 127.0.0.1:9101 or [::1]:9101" in err
    assert "\x1b" not in err


def test_a_file_and_a_server_at_once_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--listen", "127.0.0.1:0", "--textfile", "x")[::2] == (
        2, "uffdguard metrics: give either --textfile or --listen\n",
    )  # fmt: skip


def test_a_port_that_is_taken_and_an_address_of_others_are_one_line(as_root: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for where, why in (
            (f"127.0.0.1:{taken.getsockname()[1]}", "Address already in use"),
            ("192.0.2.1:9101", "Cannot assign requested address"),
        ):
            line = f"uffdguard: cannot listen on {where}: {why}; choose another address or port\n"
            assert uffdguard("metrics", "--listen", where) == Outcome(1, "", line)


@pytest.fixture(params=["127.0.0.1", "::1"])
def port(as_root: None, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Serve; give the address and the port."""
    with metrics.Server(request.param, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield request.param, int(server.server_address[1])
        server.shutdown()


def ask(port: tuple[str, int], method: str, path: str, **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(*port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers["Content-Type"], answer.read().decode()


def test_metrics_are_served_and_the_way_to_them(port: tuple[str, int]) -> None:
    status, kind, body = ask(port, "GET", "/metrics?x=y")
    assert (status, body) == (200, TEXT)
    assert kind.startswith("text/plain; version=0.0.4")
    status, kind, body = ask(port, "GET", "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert '<a href="/metrics">' in body


def test_openmetrics_is_served_to_who_asks_for_it(port: tuple[str, int]) -> None:
    status, kind, body = ask(port, "GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


def test_nothing_else_is_answered(port: tuple[str, int]) -> None:
    for path in ("/metrics/", "/favicon.ico", "/x//metrics", "/../metrics", "/<b>"):
        status, _, body = ask(port, "GET", path)
        assert status == 404
        assert "uffdguard_" not in body
        assert "<b>" not in body
    for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
        assert ask(port, method, "/metrics")[0] == 501


def test_a_scrape_asks_for_the_state_anew(port: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "status", lambda: STOPPED)
    assert "\nuffdguard_in_force 0.0\n" in ask(port, "GET", "/metrics")[2]


def test_a_client_that_is_silent_or_talks_nonsense_keeps_nobody_waiting(
    port: tuple[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(port), socket.create_connection(port) as rude, socket.create_connection(port) as gone:
        rude.sendall(b"\x00\xff\r\n\r\n" + b"x" * 100_000)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        gone.close()
        assert ask(port, "GET", "/metrics")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", metrics.ENDS)
def test_a_signal_ends_the_server_cleanly(as_root: None, number: signal.Signals) -> None:
    read, write = os.pipe()

    def job() -> None:
        os.dup2(write, 1)
        os.dup2(write, 2)
        metrics.serve("127.0.0.1", 0, lambda line: os.write(1, f"{line}\n".encode()))

    pid = forked(job)
    os.close(write)
    with open(read) as out:
        url = out.readline()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/metrics\n", url)
        assert found
        assert ask(("127.0.0.1", int(found[1])), "GET", "/metrics")[0] == 200
        os.kill(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert out.read() == ""


# What is shipped beside.


def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", prometheus.RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_alert_fires_when_it_shall_and_not_otherwise(tmp_path: Path) -> None:
    alerts = [*map(rules.alert, CONDITIONS), *rules.OTHERS]
    tests = {
        "rule_files": [str(prometheus.RULES)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [series(alert)],
                "alert_rule_test": [
                    {"eval_time": "45s", "alertname": alert.name, "exp_alerts": []},
                    {"eval_time": "4m", "alertname": alert.name, "exp_alerts": [expected(alert)]},
                    *({"eval_time": "4m", "alertname": o.name, "exp_alerts": []} for o in alerts if o != alert),
                ],
            }
            for alert in alerts
        ],
    }
    (tmp_path / "tests.yml").write_text(json.dumps(tests))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def series(alert: rules.Alert) -> dict[str, str]:
    """Return the one series that an alert looks at, which begins to fail after a minute."""
    found = re.search(r"(uffdguard_\w+)(?:{(.*?)})?(?:\[10m\]\) > 0| == ([01]))", alert.expression)
    assert found
    labels = ",".join(filter(None, ('instance="a"', found[2])))
    values = {"0": "1x4 0x20", "1": "0x4 1x20", None: "0x4 2x20"}[found[3]]
    return {"series": f"{found[1]}{{{labels}}}", "values": values}


def expected(alert: rules.Alert) -> dict[str, dict[str, str]]:
    condition = re.findall(r'condition="(.*?)"', alert.expression)
    labels = {"severity": alert.severity, "instance": "a"} | ({"condition": condition[0]} if condition else {})
    summary = f"{alert.wrong}, on a."
    description = f"What to do: {alert.remedy}. uffdguard status tells more."
    return {"exp_labels": labels, "exp_annotations": {"summary": summary, "description": description}}


def test_the_dashboard_asks_for_what_is_exported_and_shows_all_of_it() -> None:
    exported = {name for name, *_ in parsed(TEXT)}
    asked = {name for text in prometheus.expressions().values() for name in re.findall(r"uffdguard_\w+", text)}
    assert asked <= exported
    assert exported - asked == {
        "uffdguard_backend", "uffdguard_build_info", "uffdguard_interface_file", "uffdguard_native_knob",
        "uffdguard_user_mode_only",
    }  # fmt: skip


def test_the_panels_of_the_dashboard_do_not_overlap_and_ask_the_chosen_source() -> None:
    cells = [
        (x, y)
        for panel in prometheus.DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert {x for x, _ in cells} == set(range(24))
    sources = re.findall(r'"uid": "(.*?)"', (prometheus.PACKAGING / "grafana/uffdguard.json").read_text())
    assert set(sources) == {"${datasource}", "uffdguard"}


def test_the_wheel_has_the_dashboard_and_the_rules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for part in ("grafana", "prometheus"):
        assert included[f"packaging/{part}"] == f"uffdguard/share/packaging/{part}"


def test_the_documentation_names_each_metric_with_its_labels_and_no_other() -> None:
    table = re.findall(r"^\| `uffdguard_.*", (ROOT / "docs/seeing.md").read_text(), re.MULTILINE)
    documented = {
        name: sorted(filter(None, labels.split(",")))
        for name, labels in re.findall(r"`(uffdguard_\w+)(?:{([\w,]+)})?`", "".join(table))
    }
    samples = [sample for family in metrics.of_status(STATUS) for sample in family.samples]
    assert documented == {sample.name: sorted(sample.labels) for sample in samples}
