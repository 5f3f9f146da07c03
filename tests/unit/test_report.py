"""What report says of the journal: the figures are exact, and no entry that others wrote is believed."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import subprocess
import sys
import zlib
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.test_journal import EVENT, WRITE

from uffdguard import cli, config, journal, page, report, steps
from uffdguard.events import Notice
from uffdguard.policy import Mode, Policy, Request, decide

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from uffdguard.events import Entry, Event

    Journal = Callable[..., Path]
    Run = Callable[..., tuple[int, str, str]]

#: Knows of journalctl's words what report uses: matches, of which + begins an alternative.
JOURNALCTL = """#!{python}
import json, sys
words = sys.argv[1:]
if "--since=never" in words:
    sys.exit("Failed to parse timestamp: never")
matches = [{{}}]
for word in words:
    if word == "+":
        matches.append({{}})
    elif word[0] != "-":
        matches[-1].update([word.split("=")])
print({note!r}, file=sys.stderr, end="")
for line in open({entries!r}):
    try:
        entry = json.loads(line)
        shown = any(all(entry.get(key) == match[key] for key in match) for match in matches)
    except (ValueError, AttributeError, RecursionError):
        shown = True
    if shown:
        print(line, end="")
with open({words!r}, "w") as file:
    json.dump(words, file)
"""


QEMU = replace(
    EVENT,
    command="qemu-system-x86",
    executable="/usr/bin/qemu-system-x86_64",
    user="vmuser",
    unit="vm-a.service",
    verdict="allowed",
    reason="kvm",
    granted=True,
)
CRIU = replace(EVENT, executable="/usr/sbin/criu", user="root", verdict="allowed", reason="capability", capability=True)
JAVA = replace(EVENT, executable="/usr/bin/java", user="tomcat", unit="", user_mode_only=True, way="device")
HOSTILE = [
    "<script>document.title='hacked'</script>",
    '"><img src=x onerror=alert(1)>',
    "a\nb",
    "\x1b[31mred",
    "\u202e'",
]


def entry(event: Event, uid: int = 0) -> dict[str, str]:
    """Return an entry whose executable is a file of its own for each name."""
    event = replace(event, exe_inode=zlib.crc32((event.executable or event.command).encode()))
    return sent(event, uid)


def sent(entry: Entry, uid: int = 0) -> dict[str, str]:
    """Return ENTRY as the journal has it of a process of UID."""
    return {**journal.of_entry(entry), "_UID": str(uid), "_PID": "1"}


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "files", list)


@pytest.fixture
def journal_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that has journalctl find these entries; give where it writes its words."""

    def put(*entries: Event | dict[str, Any] | str, note: str = "") -> Path:
        lines = [e if isinstance(e, str) else json.dumps(e if isinstance(e, dict) else entry(e)) for e in entries]
        (tmp_path / "entries").write_text("".join(f"{line}\n" for line in lines))
        places = {name: str(tmp_path / name) for name in ("entries", "words")}
        tool = tmp_path / "journalctl"
        tool.write_text(JOURNALCTL.format(python=sys.executable, note=note, **places))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return tmp_path / "words"

    return put


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *arguments])
        return int(end.value.code or 0), *capsys.readouterr()

    return command


def counted(*events: Event, user_mode_only: bool = False) -> report.Report:
    found = report.Report(user_mode_only)
    for event in events:
        found.add(json.dumps(entry(event)).encode())
    assert not found.damaged
    return found


def test_a_program_is_one_file_and_has_its_path_once_that_is_known() -> None:
    """Processes that end too soon are known by the file alone."""
    short, long = replace(EVENT, executable="python3.11"), replace(EVENT, executable="/usr/bin/python3.11")
    other = replace(short, exe_inode=short.exe_inode + 1)
    found = report.Report(False)
    # What another user's process says of the same file renames nothing but its own uses.
    liar = replace(long, executable="/usr/bin/qemu-system-x86_64", user="eve")
    for event in (short, long, liar, short, other):
        found.add(json.dumps(journal.of_entry(event)).encode())
    assert {who[:2]: uses.asked for who, uses in found.uses.items()} == {
        ("/usr/bin/python3.11", "ada"): 3,
        ("python3.11", "ada"): 1,
        ("/usr/bin/qemu-system-x86_64", "eve"): 1,
    }
    assert found.programs == 3


def test_uses_are_counted_by_program_user_and_unit(journal_of: Journal, run: Run) -> None:
    later = replace(QEMU, time="2026-11-26T09:30:00.5+00:00", way="device")
    other = replace(QEMU, unit="vm-b.service")
    journal_of(EVENT, QEMU, later, other, QEMU, JAVA, replace(JAVA, user_mode_only=False), CRIU)
    status, out, err = run("--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert {name: found[name] for name in ("asked", "allowed", "refused", "not_enforced", "damaged")} == {
        "asked": 8, "allowed": 5, "refused": 3, "not_enforced": 0, "damaged": 0,
    }  # fmt: skip
    assert [datetime.fromisoformat(found[name]) for name in ("first", "last")] == [
        datetime.fromisoformat(event.time) for event in (EVENT, later)
    ]
    rows = [
        ("/usr/bin/qemu-system-x86_64", "vmuser", "vm-a.service", 3, (3, 0, 0), {"syscall": 2, "device": 1}, 0),
        ("/usr/bin/java", "tomcat", "", 2, (2, 0, 2), {"device": 2}, 1),
        ("/usr/bin/qemu-system-x86_64", "vmuser", "vm-b.service", 1, (1, 0, 0), {"syscall": 1}, 0),
        ("/usr/sbin/criu", "root", "ada.service", 1, (0, 0, 0), {"syscall": 1}, 0),
        # The path of its executable is not known.
        ("python3", "ada", "ada.service", 1, (1, 0, 1), {"syscall": 1}, 0),
    ]
    keys = ("program", "user", "unit", "asked", "refused_by", "ways", "with_user_mode_only")
    expected: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in rows]
    for use in expected:
        use["refused_by"] = dict(zip(Mode, use["refused_by"], strict=True))
    assert found["uses"] == expected
    programs = {
        mode: {(one["name"], one["user"]): one["refused"] for one in refused}
        for mode, refused in found["refused_programs"].items()
    }
    kvm = {("/usr/bin/java", "tomcat"): 2, ("python3", "ada"): 1}
    assert programs == {"disabled": {("/usr/bin/qemu-system-x86_64", "vmuser"): 4, **kvm}, "enabled": {}, "kvm": kvm}
    assert (found["sysctls"], found["silences"]) == ([], 0)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["no-kvm", "native"])), min_size=1),
    st.booleans(),
)
def test_what_a_mode_would_have_done_is_what_the_model_decides(
    facts: list[tuple[bool, bool, bool, str]], option: bool
) -> None:
    events = [
        replace(EVENT, capability=capability, user_mode_only=flag, granted=granted, reason=reason)
        for capability, flag, granted, reason in facts
    ]
    found = counted(*events, user_mode_only=option)
    for mode in Mode:
        refused = sum(not decide(Policy(mode, option), Request(*request)).allowed for *request, _ in facts)
        assert found.refused_by(found.policy(mode)).total() == refused
        (uses,) = found.uses.values()
        told = {0: "allowed", len(facts): "refused"}.get(refused, f"{refused} refused")
        assert uses.told(found.policy(mode)) == told


def test_the_option_of_the_configuration_holds_for_each_mode(
    journal_of: Journal, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "toml").write_text('user-mode-only = "allow"\n')
    monkeypatch.setattr(config, "files", lambda: [tmp_path / "toml"])
    journal_of(JAVA)
    found = json.loads(run("--json")[1])
    assert found["user_mode_only"] is True
    assert not any(found["refused_programs"].values())


def test_an_entry_of_another_user_is_passed_over(journal_of: Journal, run: Run) -> None:
    missing = {**journal.of_missing(5, 6), "_UID": "1000"}
    words = journal_of(QEMU, entry(EVENT, uid=1000), missing, {**entry(EVENT), "MESSAGE_ID": "0" * 32})
    found = json.loads(run("--json")[1])
    assert [found[name] for name in ("asked", "refused", "suppressed", "lost", "damaged")] == [1, 0, 0, 0, 0]
    given = json.loads(words.read_text())
    numbers = (journal.EVENT_ID, journal.SYSCTL_ID, journal.NOTICE_ID, journal.MISSING_ID)
    assert " ".join(given).endswith(" + ".join(f"MESSAGE_ID={number} _UID=0" for number in numbers))
    assert "--all" in given


@pytest.mark.parametrize(
    "damaged",
    [
        "{broken",
        "[]",
        '{"MESSAGE_ID":',
        "[" * 100_000,
        {**entry(EVENT), "UFFDGUARD_TIME": "yesterday"},
        {**entry(EVENT), "UFFDGUARD_TIME": "0001-01-01T00:00:00+23:00"},
        {**entry(EVENT), "UFFDGUARD_COMMAND": [112, 255]},
        {**entry(EVENT), "UFFDGUARD_COMMAND": None},
        {key: value for key, value in entry(EVENT).items() if key != "UFFDGUARD_GRANTED"},
        {**entry(EVENT), "MESSAGE_ID": journal.MISSING_ID},
        {**journal.of_missing(1, 2), "_UID": "0", "UFFDGUARD_LOST": "-2"},
        {**journal.of_missing(1, 2), "_UID": "0", "UFFDGUARD_LOST": "9" * 5000},
    ],
    ids=range(12),
)
def test_a_damaged_entry_is_told_and_the_others_count(journal_of: Journal, run: Run, damaged: Any) -> None:
    journal_of(QEMU, damaged, QEMU)
    status, out, err = run()
    assert (status, err) == (0, "")
    assert out.startswith("2 uses of userfaultfd by 1 program")
    assert "1 entry could not be read: the figures are too low.\n" in out
    found = json.loads(run("--json")[1])
    assert [found[name] for name in ("asked", "damaged", "suppressed", "lost")] == [2, 1, 0, 0]


def test_events_of_which_only_the_number_is_known_are_summed_and_told(journal_of: Journal, run: Run) -> None:
    journal_of(QEMU, *({**journal.of_missing(*numbers), "_UID": "0"} for numbers in ((7, 0), (5, 3))))
    assert "12 events were suppressed and 3 lost: the figures are too low.\n" in run()[1]


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_no_name_reaches_the_terminal_with_what_does_not_print(
    journal_of: Journal, run: Run, arguments: tuple[str, ...]
) -> None:
    # As nothing of ours would write them: the writer has escaped what does not print.
    journal_of(*(replace(EVENT, command=name, user=name, unit=name) for name in HOSTILE))
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines())
    assert r"\x1b[31mred" in out
    if arguments:
        assert {use["program"] for use in json.loads(out)["uses"]} >= {r"a\nb", HOSTILE[0]}
    else:
        assert len([line for line in out.splitlines() if line.endswith("syscall")]) == len(HOSTILE)


def test_a_name_that_reads_like_advice_is_in_quotes() -> None:
    name = "/tmp/x. kvm is for nobody: uffdguard mode enabled"
    told = counted(replace(EVENT, executable=name))
    assert told.recommendation()[0] == f"disabled would have refused 1 program: '{name}' of ada; kvm the same."
    assert re.findall("<code>(.*?)</code>", page.html(told)) == ["uffdguard mode disabled", "uffdguard log --all"]
    html = page.html(counted(replace(EVENT, executable="uffdguard"), QEMU))
    assert "<code>uffdguard of" not in html


def test_refused_writes_of_sysctls_and_silences_are_told_and_are_no_uses(journal_of: Journal, run: Run) -> None:
    later = replace(WRITE, time="2026-11-25T18:02:00+00:00")
    other = replace(WRITE, sysctl="vm.unprivileged_userfaultfd", value=None, user="\x1bx", unit="")
    entries: list[Entry] = [later, WRITE, other]
    entries += [Notice(EVENT.time, answers=answers) for answers in (False, True, False)]
    damaged = {**sent(WRITE), "UFFDGUARD_VALUE": "x"}
    journal_of(QEMU, *(sent(one) for one in entries), damaged)
    status, out, err = run()
    assert (status, err) == (0, "")
    section = out[out.index("Refused writes of sysctls") :].splitlines()
    when = datetime.fromisoformat(later.time).astimezone()
    assert section[2].split() == [
        "kernel.ftrace_enabled", "=", "0", "root", "sysctl", "hardening.service", "2", *f"{when:%Y-%m-%d %H:%M}".split()
    ]  # fmt: skip
    assert section[3].split()[:4] == ["vm.unprivileged_userfaultfd", r"\x1bx", "sysctl", "-"]
    assert "The policy stopped answering 2 times: nothing is known of the calls until it answered again." in section
    found = json.loads(run("--json")[1])
    assert [found[name] for name in ("asked", "damaged", "silences")] == [1, 1, 2]
    assert [write["refused"] for write in found["sysctls"]] == [2, 1]
    journal_of(QEMU)
    assert "sysctl" not in run()[1]


def test_since_is_handed_on_as_it_is(journal_of: Journal, run: Run) -> None:
    words = journal_of(QEMU)
    for since in ("yesterday", "-2h", "--follow", "2026-11-25 18:00", ""):
        assert run(f"--since={since}")[0] == 0
        assert f"--since={since}" in json.loads(words.read_text())
    run()
    assert not [word for word in json.loads(words.read_text()) if "since" in word]


def test_what_journalctl_complains_of_is_one_line(journal_of: Journal, run: Run) -> None:
    journal_of(QEMU)
    assert run("--since", "never") == (
        1, "", "uffdguard: journalctl: Failed to parse timestamp: never; journalctl(1) tells which times it takes\n"
    )  # fmt: skip
    journal_of(QEMU, note="Hint: You are currently not seeing messages\n      from other \x1busers.\n")
    assert r"journalctl: Hint: You are currently not seeing messages from other \x1busers." in run()[1].splitlines()


def test_without_journalctl_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run() == (1, "", "uffdguard: there is no journalctl; the report is made of systemd's journal\n")


def test_without_an_entry_it_says_who_writes_them(journal_of: Journal, run: Run) -> None:
    journal_of("-- No entries --")
    said = "No use of userfaultfd is recorded: have uffdguard-log.service run, or uffdguard log.\n"
    assert run() == (0, said, "")
    assert json.loads(run("--json")[1])["uses"] == []
    assert said.strip() in re.sub("</?code>", "", page.html(report.Report(user_mode_only=False)))


def test_it_says_when_who_was_allowed_is_not_recorded() -> None:
    told = "Only refusals are recorded"
    assert counted(EVENT).notes()[0].startswith(told)
    assert counted(EVENT, QEMU).notes() == []
    audited = counted(QEMU, replace(EVENT, enforced=False), EVENT).notes()
    assert audited == ["1 of the refusals are of audit, which does not carry them out."]


@pytest.mark.parametrize(
    ("events", "advice"),
    [
        ([], []),
        ([CRIU], ["disabled, the strictest mode, would have refused nobody: uffdguard mode disabled."]),
        (
            [CRIU, QEMU],
            [
                "kvm is the strictest mode that would have refused nobody: uffdguard mode kvm.",
                "disabled would have refused 1 program: /usr/bin/qemu-system-x86_64 of vmuser.",
            ],
        ),
        (
            [QEMU, EVENT],
            [
                "kvm would have refused 1 program: python3 of ada.",
                "disabled would have refused 2 programs: /usr/bin/qemu-system-x86_64 of vmuser, python3 of ada.",
                "Only enabled would have refused nobody, and it allows everybody.",
                "If none of those that kvm would have refused must have a userfaultfd: uffdguard mode kvm.",
            ],
        ),
        (
            [EVENT, JAVA],
            [
                "disabled would have refused 2 programs: /usr/bin/java of tomcat, python3 of ada; kvm the same.",
                'With user-mode-only = "allow" in the configuration, disabled would have refused 1 program: '
                "python3 of ada.",
                "Only enabled would have refused nobody, and it allows everybody.",
                "If none of those that disabled would have refused must have a userfaultfd: uffdguard mode disabled.",
            ],
        ),
        (
            [replace(EVENT, command=str(number)) for number in range(7)],
            [
                f"disabled would have refused 7 programs: {', '.join(f'{n} of ada' for n in range(5))}, 2 more; "
                "kvm the same.",
                "Only enabled would have refused nobody, and it allows everybody.",
                "If none of those that disabled would have refused must have a userfaultfd: uffdguard mode disabled.",
            ],
        ),
    ],
)
def test_the_recommendation_is_the_strictest_mode_and_names_whom_it_would_refuse(
    events: list[Event], advice: list[str]
) -> None:
    assert counted(*events).recommendation() == advice


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_table_fits_the_terminal_and_is_aligned(
    journal_of: Journal, run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    journal_of(*[QEMU] * 16, *[JAVA] * 4, replace(JAVA, capability=True), CRIU)
    lines = run()[1].splitlines()
    heading, *rows = lines[2 : lines.index("", 2)]
    assert max(map(len, (heading, *rows))) <= columns
    for word in (*Mode, "how"):
        column = heading.index(word)
        assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)
    bars = [row.count("█") for row in rows]
    assert bars[0] == columns // 16
    assert bars == sorted(bars, reverse=True)
    # The end of a path tells more than its beginning.
    assert [row.split()[0][-4:] for row in rows] == ["6_64", "java", "criu"]
    assert "  4 refused  " in rows[1]


def test_what_the_locale_cannot_show_is_escaped(journal_of: Journal) -> None:
    journal_of(replace(EVENT, command="\u20ac"))
    done = subprocess.run(
        [sys.executable, "-m", "uffdguard", "report"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u20ac" in done.stdout
    assert b"#####" in done.stdout


def test_a_bar_shows_what_is_not_nothing_and_does_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    from uffdguard.cli import render

    assert [render.bar(part, 1000, 2) for part in (0, 1, 500, 750, 1000)] == ["", "▏", "█", "█▌", "██"]
    with open(os.devnull, "w", encoding="latin-1") as old:
        monkeypatch.setattr("sys.stdout", old)
        assert [render.bar(part, 1000, 2) for part in (0, 1, 500, 1000)] == ["", "#", "#", "##"]


class TestPage:
    """The HTML file; tests/host/test_report.py shows it to a browser."""

    def test_it_has_the_figures_and_nothing_of_elsewhere(self) -> None:
        html = page.html(counted(QEMU, QEMU, EVENT, JAVA))
        assert "default-src 'none'; style-src 'unsafe-inline'" in html
        assert not re.search(r"<script|<link|<img|@import|url\(|https?:|\bon\w+=", html)
        assert [re.sub("<.*?>", " ", tile).split() for tile in re.findall("<dt>.*?</div>", html)] == [
            ["uses", "4"], ["programs", "3"], ["allowed", "2"], ["refused", "2"],
        ]  # fmt: skip
        bars = re.findall(r'aria-label="(\w+): (\d+) allowed, (\d+) refused"', html)
        assert bars == [("disabled", "0", "4"), ("enabled", "4", "0"), ("kvm", "2", "2")]
        assert html.count('<td class="who">') == 3

    @given(
        st.lists(st.tuples(st.timedeltas(timedelta(0), timedelta(days=1000)), st.booleans()), min_size=1, max_size=30),
        st.sampled_from([0.001, 0.1, 1, 10]),
    )
    def test_each_use_is_in_one_column_of_the_chart_over_time(
        self, uses: list[tuple[timedelta, bool]], scale: float
    ) -> None:
        begin = datetime(2026, 1, 31, 23, 59).astimezone()
        events = [
            replace(QEMU if allowed else EVENT, time=(begin + after * scale).isoformat()) for after, allowed in uses
        ]
        html = page.html(counted(*events))
        told = re.findall(r"<title>([\d: -]+): (.*?)</title>", html)
        for verdict, expected in (("allowed", True), ("refused", False)):
            numbers = [int(number) for _, text in told for number in re.findall(rf"(\d+) {verdict}", text)]
            assert sum(numbers) == sum(allowed is expected for _, allowed in uses)
        times = [time for time, _ in told]
        assert times == sorted(set(times))
        (what,) = re.findall(r"uses by the (\w+),", html)
        shape = {unit[0]: unit[1] for unit in page.UNITS}[what]
        assert set(times) == {datetime.fromisoformat(event.time).astimezone().strftime(shape) for event in events}
        drawn = re.findall(r'<rect class="\w+" x="([\d.]+)%" y="(-?[\d.]+)" width="([\d.]+)%"', html)
        assert all(float(x) + float(width) <= 100 and float(y) >= 0 for x, y, width in drawn)

    def test_a_clock_that_was_in_1970_makes_no_endless_chart(self) -> None:
        html = page.html(counted(replace(EVENT, time="1970-01-01T00:00:00+00:00"), EVENT))
        assert "uses by the year" in html
        assert len(html) < 30_000

    def test_who_asked_is_cut_where_there_are_too_many_and_the_others_are_summed(self) -> None:
        found = counted(*(replace(EVENT, command=f"{n:03}") for n in (*range(page.MOST + 20), 0)))
        html = page.html(found)
        assert html.count('<td class="who">') == page.MOST
        assert "and 20 more, which asked 20 times" in html

    def test_a_hostile_name_is_text(self) -> None:
        told = counted(*(replace(EVENT, executable=name, user=name, unit=name) for name in HOSTILE))
        for name in HOSTILE:
            told.add(json.dumps(sent(replace(WRITE, user=name, command=name, unit=name))).encode())
        html = page.html(told)
        assert html.count("<td>kernel.ftrace_enabled = 0<td>") == len(HOSTILE)
        assert not re.search(r"<script|<img|\x1b", html)
        assert "&lt;script&gt;document.title=&#x27;hacked&#x27;&lt;/script&gt;" in html

    def test_it_is_written_whole_or_not_at_all(self, journal_of: Journal, run: Run, tmp_path: Path) -> None:
        journal_of(EVENT)
        file = tmp_path / "report.html"
        file.write_text("before")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            status, out, err = run("--html", str(file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "File too large" in err
        assert file.read_text() == "before"
        assert not steps.beside(file).exists()

    def test_it_goes_where_a_link_points_and_is_ascii_whatever_the_locale(
        self, journal_of: Journal, run: Run, tmp_path: Path
    ) -> None:
        journal_of(replace(EVENT, command="\u00fc\u20ac"))
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "report.html")
        status, out, err = run("--html", str(link))
        assert (status, err) == (0, "")
        assert out.startswith("1 use of")
        assert link.is_symlink()
        assert b"&#252;&#8364;" in (tmp_path / "report.html").read_bytes()

    def test_a_link_in_the_place_of_the_half_written_file_is_not_followed(
        self, journal_of: Journal, run: Run, tmp_path: Path
    ) -> None:
        journal_of(EVENT)
        (tmp_path / "mine").write_text("mine")
        steps.beside(tmp_path / "report.html").symlink_to(tmp_path / "mine")
        assert run("--html", str(tmp_path / "report.html"))[0] == 0
        assert (tmp_path / "mine").read_text() == "mine"

    def test_a_device_is_not_replaced_by_a_file(self, journal_of: Journal, run: Run, tmp_path: Path) -> None:
        journal_of(EVENT)
        os.mkfifo(tmp_path / "fifo")
        for name in (str(tmp_path / "fifo"), str(tmp_path), "/dev/null"):
            assert run("--html", name)[::2] == (
                1,
                f"uffdguard: {name} is not a regular file; name one that is, or that does not exist\n",
            )
        assert (tmp_path / "fifo").is_fifo()


def test_colours_are_for_terminals_only(journal_of: Journal, run: Run) -> None:
    journal_of(QEMU, EVENT)
    out = run()[1]
    assert out == click.unstyle(out)


def test_a_million_entries_take_no_more_memory_than_a_few(journal_of: Journal) -> None:
    """Counted with fewer: what is kept does not grow with entries of the same."""
    import gc
    import tracemalloc

    line = json.dumps(entry(QEMU)).encode()
    found = report.Report(user_mode_only=False)
    kept = []
    # Of ours alone: other tests' threads may still run.
    ours = [tracemalloc.Filter(True, str(module.__file__)) for module in (report, journal)]
    tracemalloc.start()
    for _ in range(2):
        for _ in itertools.repeat(None, 2000):
            found.add(line)
        gc.collect()  # when it last ran by itself is chance
        kept.append(sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(ours).traces))
    tracemalloc.stop()
    assert found.asked == 4000
    assert kept[0] > 0
    # The decoder of JSON keeps up to 30 KB of short strings; an object of each entry would be 100 KB.
    assert kept[1] - kept[0] < 50_000
