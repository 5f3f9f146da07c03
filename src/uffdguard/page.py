"""A report as one HTML file: charts without a script, nothing from elsewhere, light and dark, for screen and paper."""

from __future__ import annotations

import os
import re
from collections import Counter
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from uffdguard import __version__, steps
from uffdguard.errors import Failure, one_line
from uffdguard.policy import Mode
from uffdguard.report import named

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdguard.report import Report, Uses, Who

#: At the end of a sentence: what the reader may type. No name is taken for it, for one with a blank has quotes.
COMMAND = re.compile(r"uffdguard (?:log|mode)[\w -]*(?=\.</p>)")
#: How many rows are shown; the others are summed.
MOST = 100
#: How many columns the chart over time has at most, unless there are more years.
COLUMNS = 72
HEIGHT = 168
#: What a column stands for, how it is written, and how long it is.
UNITS = (
    ("hour", "%Y-%m-%d %H:00", timedelta(hours=1)),
    ("day", "%Y-%m-%d", timedelta(days=1)),
    ("month", "%Y-%m", timedelta(days=30)),
    ("year", "%Y", timedelta(days=365)),
)

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f6f9; --card: #fff; --ink: #1b2430; --soft: #5b6675; --line: #dde2e9; --grid: #e9edf2;
  --allowed: #2563eb; --refused: #d9480f; --allowed-ink: #1d4fc4; --refused-ink: #b23a09;
  --allowed-wash: #e8effd; --refused-wash: #fdeee6;
  --allowed-edge: #c5d6fa; --refused-edge: #f8d3bf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e131a; --card: #171e27; --ink: #e7ebf1; --soft: #9ba7b6; --line: #2a3440; --grid: #232c37;
    --allowed: #5b8def; --refused: #f08244; --allowed-ink: #9dbdff; --refused-ink: #ffb287;
    --allowed-wash: #1b2a47; --refused-wash: #3a2317;
    --allowed-edge: #2c4473; --refused-edge: #643a22;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 40px }
h1 { font-size: 26px; line-height: 1.25; margin: 0; letter-spacing: -.01em }
h2 { font-size: 16px; margin: 0 0 2px }
p { margin: 0 }
.soft, header p, footer, h2 + p { color: var(--soft); font-size: 13.5px }
.card, .tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
.card { padding: 20px 22px; margin-top: 16px }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin-top: 20px }
.tiles div { padding: 14px 18px }
.tiles dt { color: var(--soft); font-size: 13.5px }
.tiles dd { margin: 0; font-size: 28px; line-height: 1.25; font-weight: 600 }
dl { margin: 0 }
.advice { background: var(--allowed-wash); border-color: var(--allowed-edge) }
.advice p { overflow-wrap: anywhere }
.advice p + p { margin-top: 6px }
.advice p:nth-of-type(1) { font-size: 18px; line-height: 1.4; font-weight: 600 }
.note { background: var(--refused-wash); border-color: var(--refused-edge); padding-block: 14px }
code { font: 0.92em ui-monospace, "DejaVu Sans Mono", monospace; white-space: nowrap }
code { background: var(--card); border-radius: 5px; padding: 1px 6px }
.note p + p { margin-top: 6px }
.legend { display: flex; gap: 18px; margin-top: 10px; font-size: 13.5px; color: var(--soft) }
i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px }
svg { display: block; width: 100%; overflow: visible }
svg rect { stroke: var(--card); stroke-width: 1px }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums }
.allowed { fill: var(--allowed); background: var(--allowed) }
.refused { fill: var(--refused); background: var(--refused) }
.track { fill: var(--grid) }
.grid { stroke: var(--grid) } .axis { stroke: var(--line) }
.mode { display: grid; grid-template-columns: 88px 1fr; gap: 4px 16px; align-items: center; margin-top: 16px }
.mode b { font-size: 15px }
.mode p { grid-column: 2; font-size: 13.5px; color: var(--soft); overflow-wrap: anywhere }
.plot { display: grid; grid-template-columns: max-content 1fr; column-gap: 10px; margin-top: 18px }
.marks { text-anchor: end }
table { border-collapse: collapse; width: 100%; margin-top: 12px; font-size: 14px }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; white-space: nowrap }
th { padding: 6px 12px 6px 0 }
td { padding: 10px 12px 10px 0; border-top: 1px solid var(--line); vertical-align: middle }
th:last-child, td:last-child { padding-right: 0 }
.who { overflow-wrap: anywhere; line-height: 1.4; min-width: 230px }
.who b { font-weight: 600; display: block }
.how { color: var(--soft); font-size: 13px; line-height: 1.4; width: 16%; min-width: 130px }
.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; width: 1% }
.bar { width: 20%; min-width: 90px }
.says { width: 1%; white-space: nowrap }
.chip { display: inline-block; border-radius: 999px; padding: 1px 10px; font-size: 13px; white-space: nowrap }
.chip.yes { color: var(--allowed-ink); background: var(--allowed-wash) }
.chip.no { color: var(--refused-ink); background: var(--refused-wash) }
.chip.part { color: var(--refused-ink); box-shadow: inset 0 0 0 1px var(--refused) }
footer { margin-top: 20px }
footer p { overflow-wrap: anywhere }
@media screen and (max-width: 760px) {
  main { padding: 22px 14px 32px }
  h1 { font-size: 22px }
  .card { padding: 16px }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; margin-top: 16px }
  .tiles div { padding: 10px 14px }
  .tiles dd { font-size: 24px }
  .mode { grid-template-columns: 1fr }
  .mode p { grid-column: 1 }
  table, tbody { display: block }
  thead { display: none }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px }
  tr { border-top: 1px solid var(--line); padding: 14px 0 }
  tr:last-child { padding-bottom: 0 }
  td { border: 0; padding: 0; width: auto }
  td.who { grid-column: 1 / 3; min-width: 0 }
  td.number { font-size: 18px; font-weight: 600; width: auto }
  td.bar, td.how { grid-column: 1 / 4; width: auto }
  td.says { width: auto; white-space: normal; font-size: 13px }
  td.says::before { content: attr(data-mode); display: block; color: var(--soft); margin-bottom: 2px }
}
@media print {
  :root {
    color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --grid: #e4e4e4;
    --allowed: #2563eb; --refused: #d9480f; --allowed-ink: #1d4fc4; --refused-ink: #b23a09;
    --allowed-wash: #fff; --refused-wash: #fff; --allowed-edge: #2563eb; --refused-edge: #d9480f;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  main { max-width: none; padding: 0 }
  .bar { width: 10%; min-width: 60px }
  .how { min-width: 90px }
  tr, .card:not(.long), .mode { break-inside: avoid }
}
"""


def save(report: Report, file: str) -> None:
    """Write REPORT to FILE, whole or not at all.

    :raises Failure: it cannot be written.
    """
    path = Path(file).resolve()
    # A device or a pipe would be replaced by the file.
    if path.exists() and not path.is_file():
        raise Failure(f"{file} is not a regular file", "name one that is, or that does not exist")
    # Whatever the locale's encoding is.
    steps.write(path, html(report).encode("ascii", "xmlcharrefreplace").decode())


def html(report: Report) -> str:
    """Return the page."""
    host, now = escape(one_line(os.uname().nodename)), datetime.now().astimezone().isoformat(timespec="seconds")
    option = "allow" if report.user_mode_only else "deny"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Who used userfaultfd on {host}</title><style>{STYLE}</style></head><body><main>",
            f"<header><h1>Who used userfaultfd on {host}</h1><p>{escape(_period(report))}</p></header>",
            *(_charts(report) if report.uses else [_card([report.summary()], "advice")]),
            *(_writes(report) if report.writes else []),
            *([_card(report.notes(), "note")] if report.notes() else []),
            "<footer><p>From the journal, where uffdguard log writes each decision with what it was taken on. What a "
            "mode would have done is the decision on the same with that mode in force and "
            f"user-mode-only&nbsp;=&nbsp;&quot;{option}&quot;, as the configuration says.</p>"
            f"<p>uffdguard {__version__}, {now}</p></footer></main></body></html>\n",
        ]
    )


def _charts(report: Report) -> list[str]:
    tiles = {
        "uses": report.asked,
        "programs": report.programs,
        '<i class="allowed"></i>allowed': report.allowed,
        '<i class="refused"></i>refused': report.refused,
    }
    return [
        _card(report.recommendation(), "advice"),
        f'<dl class="tiles">{"".join(f"<div><dt>{name}</dt><dd>{n:,}</dd></div>" for name, n in tiles.items())}</dl>',
        '<section class="card"><h2>What each mode would have done</h2>'
        "<p>with the same uses, and which programs it would have refused</p>",
        *(_mode(report, mode) for mode in Mode),
        f"{_legend('allowed', 'refused')}</section>",
        *_over_time(report.hours),
        '<section class="card long"><h2>Who asked, and how often</h2>'
        "<p>by program, which is its own word, by user and by unit</p>",
        *_table(report),
        "</section>",
    ]


def _period(report: Report) -> str:
    if not report.first or not report.last:
        return "nothing is recorded"
    return f"{report.first:%Y-%m-%d %H:%M} to {report.last.isoformat(' ', 'minutes')}"


def _card(sentences: Iterable[str], kind: str) -> str:
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    text = COMMAND.sub(r"<code>\g<0></code>", text)
    return f'<section class="card {kind}">{text}</section>'


def _legend(*words: str) -> str:
    return f'<div class="legend">{"".join(f"<span><i class={word}></i>{word}</span>" for word in words)}</div>'


def _mode(report: Report, mode: Mode) -> str:
    """Return what MODE would have done, as a bar and in words."""
    programs = report.refused_by(report.policy(mode))
    refused = programs.total()
    share = 100 * refused / report.asked
    told = f"{report.asked - refused:,} allowed, {refused:,} refused"
    who = f": {named(programs, 8)}" if programs else ""
    return (
        f'<div class="mode"><b>{mode}</b><svg height="18" role="img" aria-label="{mode}: {told}">'
        f'<rect class="allowed" width="{100 - share:.3f}%" height="18"/>'
        f'<rect class="refused" x="{100 - share:.3f}%" width="{share:.3f}%" height="18"/></svg>'
        f"<p>{told}{escape(who)}</p></div>"
    )


def _over_time(hours: dict[datetime, Counter[str]]) -> list[str]:
    """Return a chart of the uses by the hour, the day, the month or the year."""
    time, last = min(hours), max(hours)
    what, shape, length = next((unit for unit in UNITS if last - time < COLUMNS * unit[2]), UNITS[-1])
    slots: dict[str, Counter[str]] = {}
    step = min(length, timedelta(days=28))  # into each month
    for number in range((last - time) // step + 1):
        slots.setdefault((time + number * step).strftime(shape), Counter())
    for hour, counts in hours.items():
        slots.setdefault(hour.strftime(shape), Counter()).update(counts)

    most = max(counts.total() for counts in slots.values())
    # Few columns are not made broader than a twelfth.
    columns = max(len(slots), 12)
    drawn = ""
    for index, (slot, counts) in enumerate(slots.items()):
        x = 100 * (index + 0.1) / columns
        y = float(HEIGHT)
        bars = ""
        for verdict in ("allowed", "refused"):
            height = HEIGHT * counts[verdict] / most
            y -= height
            bars += (
                f'<rect class="{verdict}" x="{x:.3f}%" y="{y:.1f}" width="{80 / columns:.3f}%" height="{height:.1f}"/>'
            )
        if counts:
            told = ", ".join(f"{number:,} {verdict}" for verdict, number in sorted(counts.items()))
            drawn += f"<g><title>{slot}: {told}</title>{bars}</g>\n"
        if index % -(-columns // 4) == 0:
            drawn += f'<line class="axis" x1="{x:.3f}%" x2="{x:.3f}%" y1="{HEIGHT}" y2="{HEIGHT + 6}"/>'
            for row, text in enumerate(reversed(slot.split(" "))):
                drawn += f'<text x="{x:.3f}%" y="{HEIGHT + 20 + 16 * row}">{text}</text>'
    lines = labels = ""
    for mark in (most, most / 2, 0) if most % 2 == 0 else (most, 0):
        y = HEIGHT - HEIGHT * mark / most
        lines += f'<line class="{"grid" if mark else "axis"}" x2="100%" y1="{y}" y2="{y}"/>'
        labels += f'<text x="100%" y="{y + 4}">{mark:,.0f}</text>'
    below = 40 if what == "hour" else 24
    return [
        f'<section class="card"><h2>When</h2><p>uses by the {what}, local time, and what was answered</p>',
        f'<div class="plot"><svg class="marks" height="{HEIGHT}" style="width:{len(f"{most:,}")}ch">{labels}</svg>',
        f'<svg height="{HEIGHT + below}" role="img" aria-label="uses by the {what}">{lines}',
        f"{drawn}</svg></div>{_legend('allowed', 'refused')}</section>",
    ]


def _table(report: Report) -> list[str]:
    """Return the rows of who asked."""
    ranking = report.ranking()
    most = ranking[0][1].asked
    heads = ["program", '<th class="number">asked', "", *Mode, "how"]
    cells = "".join(head if head.startswith("<") else f"<th>{head}" for head in heads)
    rest = ranking[MOST:]
    asked = sum(uses.asked for _, uses in rest)
    more = f'<p class="soft">and {len(rest):,} more, which asked {asked:,} times: uffdguard report</p>'
    return [
        f"<table><thead><tr>{cells}</thead><tbody>",
        *(_row(report, who, uses, most) for who, uses in ranking[:MOST]),
        "</tbody></table>",
        *([more] if rest else []),
    ]


def _writes(report: Report) -> list[str]:
    """Return the refused writes of sysctls."""
    heads = ("sysctl", "user", "command", "unit or container", "refused", "last")
    rows = (
        (*write, f"{refused:,}", f"{report.last_writes[write]:%Y-%m-%d %H:%M}")
        for write, refused in report.writes.most_common(MOST)
    )
    return [
        '<section class="card long"><h2>Refused writes of sysctls</h2><p>which would have undone the policy</p>',
        f"<table><thead><tr>{''.join(f'<th>{head}' for head in heads)}</thead><tbody>",
        *("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows),
        "</tbody></table></section>",
    ]


def _row(report: Report, who: Who, uses: Uses, most: int) -> str:
    width = 100 * uses.asked / most
    says = ""
    for mode in Mode:
        told = uses.told(report.policy(mode))
        kind = {"allowed": "yes", "refused": "no"}.get(told, "part")
        says += f'<td class="says" data-mode="{mode}"><span class="chip {kind}">{told}</span>'
    return (
        f'<tr><td class="who"><b>{escape(who.program)}</b><span class="soft">{escape(who.user)}'
        f"{escape(f', {who.unit}') if who.unit else ''}</span>"
        f'<td class="number">{uses.asked:,}<td class="bar"><svg height="12">'
        '<rect class="track" width="100%" height="12" rx="3"/>'
        f'<rect class="allowed" width="{width:.2f}%" height="12" rx="3"/></svg>{says}<td class="how">{uses.how()}'
    )
