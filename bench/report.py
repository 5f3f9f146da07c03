"""docs/performance.md and docs/performance.svg, from the figures in docs/performance.json."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from bench.guest import (
    AGAIN,
    CREATIONS,
    ENFORCED,
    FLOOR,
    FREE,
    IO_URING,
    MODES,
    NONE,
    OPEN_KVM,
    PATHS,
    SUBJECTS,
    USER_MODE_ONLY,
)

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = DOCS / "performance.json"
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "performance.svg"
TEMPLATE = Path(__file__).with_name("performance.md")

KVM = "uffdguard kvm"


def number(value: float) -> str:
    """Return a whole number, its thousands apart."""
    return f"{round(value):,}"


def difference(value: float) -> str:
    """Return a difference with its sign."""
    return f"{round(value):+,}" if round(value) else "0"


def table(rows: list[list[str]]) -> str:
    """Return ROWS, the heading first, as a table in Markdown; numbers are to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * (width - bool(n)) + ":" * bool(n) for n, width in enumerate(widths)))
    return "\n".join(f"| {line} |" for line in lines)


def added(found: dict[str, Any], path: str, subject: str, to: str = NONE) -> float:
    """Return what SUBJECT adds to a call."""
    return float(found["calls"][path][subject]["least"] - found["calls"][path][to]["least"])


def calls(found: dict[str, Any]) -> str:
    """Return the table of every path with every subject."""
    others = {"no AppArmor": "bare", "SELinux, no policy": "selinux"}
    subjects = [name for name in SUBJECTS if name != NONE]
    rows = [["", NONE, *subjects, *others]]
    for path in PATHS:
        row = found["calls"][path]
        cells = [f"{number(row[NONE]['least'])} ±{number(row[NONE]['spread'])}"]
        for name in subjects:
            told = f"{row[name]['refused']}, " if row[name]["refused"] else ""
            cells.append(told + difference(added(found, path, name)))
        cells += [
            difference(found[part][path][NONE]["least"] - row[NONE]["least"]) if part in found else "not measured"
            for part in others.values()
        ]
        rows.append([path, *cells])
    return table(rows)


def repeated(found: dict[str, Any]) -> str:
    """Tell by how much two runs without a policy differ."""
    return "; ".join(f"{path} {difference(added(found, path, AGAIN))}" for path in PATHS)


def grants(found: dict[str, Any]) -> str:
    """Return the table of the growth with the grants."""
    paths = list(found["grants"]["1"])
    rows = [["grants", *paths]]
    for count, row in found["grants"].items():
        cells = [f"{number(row[path][KVM]['least'])} ±{number(row[path][KVM]['spread'])}" for path in paths]
        rows.append([number(int(count)), *cells])
    return table(rows)


def growth(found: dict[str, Any], part: str, heading: str, figure: str) -> str:
    """Return a table of what mode kvm adds to a creation, by threads or refusals."""
    if part not in found:
        return "Not measured."
    rows = [[heading, NONE, KVM, "difference"]]
    for count, paths in found[part].items():
        (row,) = paths.values()
        values = [row[name][figure] for name in (NONE, KVM)]
        rows.append([count, *map(number, values), difference(values[1] - values[0])])
    return table(rows)


def processors(found: dict[str, Any]) -> str:
    """Return the table of ratios, by CPUs."""
    rows = [["CPUs", f"{FLOOR} / {NONE}", f"{KVM} / {NONE}"]]
    if "cpus_4" not in found:
        return "Not measured."
    for count in (1, 2, 4):
        (row,) = found[f"cpus_{count}"].values()
        rows.append([str(count), *(f"{row[name]['least'] / row[NONE]['least']:.2f}" for name in (FLOOR, KVM))])
    return table(rows)


def commands(found: dict[str, Any]) -> str:
    """Return the table of whole commands."""
    taken = found["commands"]
    python = taken["python3 -c pass"]["instructions"]
    rows = [["command", "instructions, millions", "of `python3 -c pass`", "calls of bpf(2)"]]
    for name, what in taken.items():
        rows.append(
            [
                f"`{name}`",
                f"{what['instructions'] / 1e6:.0f}",
                f"{what['instructions'] / python:.1f} times",
                str(what["bpf"]),
            ]
        )
    return table(rows)


def memory(found: dict[str, Any]) -> str:
    """Return the table of what stays in memory."""
    rows = [["what", "KiB"], *([name, number(-(-size // 1024))] for name, size in found["memory"].items())]
    return table(rows)


def reason_of(path: str, subject: str) -> str:
    """Return why a creation is allowed, for the row of the goals."""
    if "by root" in path:
        # There the native knob is 0, and two programs at the end of the system call count what it refuses.
        native = path.startswith("userfaultfd") and subject.startswith("uffdguard disabled")
        return "capability in mode disabled" if native else "capability"
    if subject == USER_MODE_ONLY:
        return "user-mode-only in mode disabled"
    return "kvm" if subject == KVM else "enabled"


def goals(found: dict[str, Any]) -> str:
    """Return the table of the goals."""
    creations: dict[str, list[float]] = {}
    for path in CREATIONS:
        for name in ENFORCED:
            if not found["calls"][path][name]["refused"]:
                creations.setdefault(reason_of(path, name), []).append(added(found, path, name, FLOOR))
    refused = max(
        added(found, path, name) for path in CREATIONS for name in ENFORCED if found["calls"][path][name]["refused"]
    )
    opened = max(added(found, OPEN_KVM, name) for name in MODES)
    gone_by = max(added(found, IO_URING, name) for name in MODES)
    floor = added(found, IO_URING, FLOOR)
    exact = ["page fault served", "getppid", "eventfd", "open tmpfs file", "open /dev/null", "mmap, munmap"]
    free = max(added(found, path, name) for path in exact for name in MODES)
    part = {
        path: max(added(found, path, name) / found["calls"][path][NONE]["least"] for name in MODES)
        for path in FREE
        if path not in exact
    }
    least = [row["userfaultfd after /dev/kvm"][KVM]["least"] for row in found["grants"].values()]
    several = [
        row["userfaultfd after /dev/kvm"][KVM]["least"] - row["userfaultfd after /dev/kvm"][NONE]["least"]
        for row in found["threads"].values()
    ]
    taken = {name: what["instructions"] for name, what in found["commands"].items()}
    python = taken["python3 -c pass"]
    rows = [["what", "goal", "found", ""]]

    def row(what: str, goal: str, value: str, met: bool) -> None:
        rows.append([what, goal, value, "met" if met else "missed"])

    for reason, values in creations.items():
        spread = " to ".join(dict.fromkeys(map(difference, (min(values), max(values)))))
        row(f"a creation allowed by {reason}, over the empty program", "at most +80", spread, max(values) <= 80)
    row("a refused creation, over none", "below 0", f"at most {difference(refused)}", refused < 0)
    row("open of /dev/kvm", "at most +300", difference(opened), opened <= 300)
    row(", ".join(exact), "0, ±2", f"at most {difference(free)}", free <= 2)
    percent = found["calls"][IO_URING][NONE]["least"] / 100
    row(
        IO_URING,
        f"that of the empty program, {difference(floor)}, within 1 %",
        difference(gone_by),
        gone_by <= floor + percent,
    )
    for path, share in part.items():
        row(path, "0, within 1 %", f"{share:+.1%}".replace("%", " %"), share <= 0.01)
    row(
        "1 to 10,000 grants",
        "within 10",
        f"within {number(max(least) - min(least))}",
        max(least) - min(least) <= 10,
    )
    row(
        "1 to 64 threads",
        "within 10",
        f"within {number(max(several) - min(several))}",
        max(several) - min(several) <= 10,
    )
    for verb, most in (("mode", 3), ("status", 5)):
        ratio = taken[f"uffdguard {verb}"] / python
        row(f"start of `{verb}`", f"at most {most} times `python3 -c pass`", f"{ratio:.1f} times", ratio <= most)
    knob = found["memory"]["knob, resident"] / 2**20
    row("knob, resident", "at most 20 MiB", f"{knob:.1f} MiB", knob <= 20)
    return table(rows)


#: Of the picture: its paths, with what they are called there, and its subjects, with their colours.
COLUMNS = {
    "userfaultfd after /dev/kvm": ("userfaultfd()", "+ close"),
    OPEN_KVM: ("open /dev/kvm", "+ close"),
    "open tmpfs file": ("open any file", "+ close"),
    "getppid": ("getppid", "the least call"),
    "page fault served": ("page fault", "served by userfaultfd"),
}
BARS = {
    FLOOR: ("empty LSM program", "the floor", "#cbd5e1", "#8b96a5"),
    KVM: ("uffdguard, mode kvm", "decides in the kernel", "#dbeafe", "#2563eb"),
    "LSM program on file_open": ("LSM on file_open", "sees /dev/kvm, no decision", "#fef3c7", "#b45309"),
    "seccomp filter": ("seccomp filter", "a list, as of containers", "#fef3c7", "#b45309"),
    "seccomp supervisor": ("seccomp supervisor", "decides in user space", "#fee2e2", "#dc2626"),
}


def picture(found: dict[str, Any]) -> str:
    """Return the picture: what each subject adds to a call, in instructions."""
    left, width, top, height, gap, scale = 208, 132, 92, 58, 12, 96 / 650
    bottom = top + height * len(BARS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 {bottom + 46}" role="img" '
        'aria-label="Instructions that each way to govern userfaultfd adds to a call">',
        "<style>",
        "text { font-family: system-ui, sans-serif; fill: #1b2430 }",
        ".t { font-size: 14px; font-weight: 600 } .s { font-size: 12px; fill: #5b6675 } .v { font-size: 12px }",
        ".m { text-anchor: middle } .zone { fill: #f6f8fa; stroke: #d0d7de; stroke-width: 1.5 }",
        "</style>",
        f'<rect width="880" height="{bottom + 46}" fill="#fff"/>',
        f'<rect class="zone" x="10" y="10" width="860" height="{bottom + 26}" rx="8"/>',
        '<text class="s" x="24" y="34">instructions added</text>',
        '<text class="s" x="24" y="50">to a call</text>',
    ]
    for column, (path, (name, more)) in enumerate(COLUMNS.items()):
        x = left + column * width
        whole = number(found["calls"][path][NONE]["least"])
        parts += [
            f'<text class="t" x="{x}" y="34">{escape(name)}</text>',
            f'<text class="s" x="{x}" y="50">{escape(more)}</text>',
            f'<text class="s" x="{x}" y="68">{whole} by itself</text>',
            f'<path d="M{x},{top - 8} V{bottom - 4}" stroke="#d0d7de"/>',
        ]
    for line, (subject, (name, more, fill, stroke)) in enumerate(BARS.items()):
        y = top + line * height
        parts += [
            f'<text class="t" x="24" y="{y + 16}">{escape(name)}</text>',
            f'<text class="s" x="24" y="{y + 33}">{escape(more)}</text>',
        ]
        for column, path in enumerate(COLUMNS):
            x = left + column * width
            value = added(found, path, subject)
            share = value / found["calls"][path][NONE]["least"]
            if abs(value) <= 8:  # two runs without a policy differ as much
                parts.append(f'<text class="s" x="{x + 8}" y="{y + 20}">0</text>')
                continue
            length = min(value * scale, width - gap - 8)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{length:.0f}" height="18" fill="{fill}" stroke="{stroke}" rx="2"/>'
            )
            if value * scale > length:  # the bar is cut
                parts.append(
                    f'<path d="M{x + length - 22:.0f},{y + 22} l6,-26 M{x + length - 14:.0f},{y + 22} l6,-26" '
                    'stroke="#fff" stroke-width="4"/>'
                )
            parts.append(f'<text class="v" x="{x + 2}" y="{y + 34}">{difference(value)}  ({share:+.0%})</text>')
    parts += [
        f'<text class="s" x="24" y="{bottom + 18}">Linux {found["versions"]["release"]}, counted by QEMU</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def write(found: dict[str, Any]) -> None:
    """Write the report and its picture."""
    versions = found["versions"] | found["host"] | {"wheel": number(found["host"]["wheel"] / 1024)}
    PAGE.write_text(
        TEMPLATE.read_text().format(
            **versions,
            spreads=repeated(found),
            goals=goals(found),
            calls=calls(found),
            grants=grants(found),
            threads=growth(found, "threads", "threads", "least"),
            refusals=growth(found, "refusals", "refusals a second", "mean"),
            processors=processors(found),
            commands=commands(found),
            memory=memory(found),
        )
    )
    PICTURE.write_text(picture(found))
