"""docs/dashboard.png, ``make dashboard``: our Grafana dashboard, drawn from what its expressions give.

``record`` runs in the lab: some minutes of creations at varying rates in mode kvm, scraped by a real Prometheus; it
prints what this answers to each expression. ``draw`` makes an SVG of that, in the dashboard's own layout: Debian
has no Grafana.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus
from inside import USER, force_knob, forked, until

from uffdguard import guard
from uffdguard.kernel import native
from uffdguard.policy import Mode, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds that are recorded, and from when to when of them the native knob is off by itself.
LENGTH, DRIFT = 360, (235, 260)
#: When each of some virtual machines begins and ends.
MACHINES = ((10, 340), (35, 360), (60, 205), (90, 280), (95, 360), (150, 360), (215, 300), (300, 360))
USERFAULTFD, USER_MODE_ONLY = 323, 1


def refused(t: float) -> float:
    """Return how many a second somebody asks for who may not: a little always, and two bursts."""
    return 2 + 9 * math.exp(-(((t - 120) / 14) ** 2)) + 14 * math.exp(-(((t - 300) / 10) ** 2))


#: Who asks: its user, whether it opens /dev/kvm, its flags, and how often it asks, a second.
ASKERS: tuple[tuple[int, bool, int, Callable[[float], float]], ...] = (
    (USER, False, 0, refused),
    (USER, True, 0, lambda t: 6 + 3 * math.sin(t / 28)),
    (USER, False, USER_MODE_ONLY, lambda t: 3 * (math.sin(t / 45) > 0) + 0.5),
    (0, False, 0, lambda t: 1.2),
)


def become(user: int, kvm: bool) -> None:
    """Become that user, and open /dev/kvm."""
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if kvm:
        os.open("/dev/kvm", os.O_RDWR)


def ask(user: int, kvm: bool, flags: int, rate: Callable[[float], float]) -> None:
    """Ask for userfaultfds for as long as this process lives."""
    become(user, kvm)
    chance = random.Random(user + kvm + flags)
    libc = ctypes.CDLL(None)
    begin = time.monotonic()
    while True:
        time.sleep(chance.expovariate(rate(time.monotonic() - begin)))
        fd = libc.syscall(USERFAULTFD, flags)
        if fd >= 0:
            os.close(fd)


def hold(user: int) -> None:
    """Be a virtual machine, as far as the policy can see."""
    become(user, True)
    signal.pause()


@contextlib.contextmanager
def load() -> Iterator[Callable[[float], None]]:
    """Have the askers ask; the function given does what else is due in a second."""
    pids: dict[object, int] = {asker: forked(functools.partial(ask, *asker)) for asker in ASKERS}

    def end(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def go_on(now: float) -> None:
        for machine in MACHINES:
            if machine[0] <= now < machine[1] and machine not in pids:
                pids[machine] = forked(functools.partial(hold, USER))
            elif now >= machine[1] and machine in pids:
                end(pids.pop(machine))
        wanted = 0 if DRIFT[0] <= now < DRIFT[1] else 1
        if native.read_knob() != wanted:
            force_knob(wanted)

    try:
        yield go_on
    finally:
        for pid in pids.values():
            end(pid)


def record() -> None:
    """Print what Prometheus has seen, as JSON."""
    if "virtme" not in Path("/proc/cmdline").read_text():
        sys.exit("run it in the lab, with make dashboard")
    native.DEV_KVM.chmod(0o666)
    with contextlib.ExitStack() as stack:
        guard.start(Policy(user_mode_only=True), Mode.KVM)
        stack.callback(guard.stop)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target = stack.enter_context(prometheus.served("127.0.0.1:9101"))
        server = stack.enter_context(prometheus.scraping(target, folder))
        until(lambda: server.query("up") == {(): 1})
        go_on = stack.enter_context(load())
        begin = time.time()
        while (now := time.time() - begin) < LENGTH:
            go_on(now)
            time.sleep(1)
        end, answers = begin + LENGTH, {}
        for (title, kind, ref), text in prometheus.expressions().items():
            if kind == "stat":
                answer = server.get("query", query=text, time=end)
            else:
                answer = server.get("query_range", query=text, start=begin, end=end, step=2)
            answers[f"{title}/{kind}/{ref}"] = answer["result"]
    print(json.dumps({"begin": begin, "end": end, "answers": answers}))


# The picture.

COLUMN, ROW, GAP = 50, 34, 8
#: Grafana's names of colours.
COLOURS = {
    "green": "#73bf69", "dark-green": "#37872d", "light-green": "#a9dfa1", "red": "#f2495c", "dark-red": "#c4162a",
    "orange": "#ff9830", "yellow": "#fade2a", "blue": "#5794f2", "purple": "#b877d9", "text": "#1b2430",
}  # fmt: skip
Answer = list[dict[str, Any]]
Series = tuple[str, str, list[tuple[float, float]]]  # name, colour, points


def named(legend: str, metric: dict[str, str]) -> str:
    """Return what the legend calls a series."""
    for label, value in metric.items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    return legend


def colour(panel: dict[str, Any], name: str, number: int) -> str:
    """Return the colour of a series: the one that the panel says, or the next of the palette."""
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] == name:
            return COLOURS[override["properties"][0]["value"]["fixedColor"]]
    return (COLOURS["green"], COLOURS["blue"], COLOURS["orange"])[number % 3]


def stat(panel: dict[str, Any], answer: Answer, x: float, y: float, w: float, h: float) -> Iterator[str]:
    """Draw one figure on its colour."""
    defaults = panel["fieldConfig"]["defaults"]
    text, fill = defaults["noValue"], "text"
    if answer:
        value = float(answer[0]["value"][1])
        text = f"{value:g}"
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is None or value >= step["value"]:
                fill = step["color"]
        for mapping in defaults.get("mappings", ()):
            if text in mapping["options"]:
                fill, text = mapping["options"][text]["color"], mapping["options"][text]["text"]
        if panel["options"]["textMode"] == "name":
            text = named(panel["targets"][0]["legendFormat"], answer[0]["metric"])
        fill = defaults.get("color", {}).get("fixedColor", fill)
        fill = COLOURS.get(fill, fill)
        fill = colour(panel, text, 0) if panel["fieldConfig"]["overrides"] else fill
    yield f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}"/>'
    yield f'<text class="title on" x="{x + 12}" y="{y + 22}">{escape(panel["title"])}</text>'
    yield f'<text class="figure on" x="{x + w / 2}" y="{y + h / 2 + 26}">{escape(text)}</text>'


def round_up(value: float) -> float:
    """Return the step of an axis that has some four of them up to VALUE."""
    power = 10 ** math.floor(math.log10(value / 4))
    return next(float(power * factor) for factor in (1, 2, 5, 10) if power * factor * 4 >= value)


def timeseries(panel: dict[str, Any], all_series: list[Series], span: tuple[float, float], box: Any) -> Iterator[str]:
    """Draw lines over time, stacked or not, with axes and a legend."""
    x, y, w, h = box
    custom = panel["fieldConfig"]["defaults"]["custom"]
    stacked = custom["stacking"]["mode"] == "normal"
    yield f'<rect class="panel" x="{x}" y="{y}" width="{w}" height="{h}" rx="4"/>'
    yield f'<text class="title" x="{x + 12}" y="{y + 22}">{escape(panel["title"])}</text>'

    places, where, line = [], x + 12, 0
    for name, _, _ in all_series:
        length = 26 + 6.3 * len(name)
        if where + length > x + w:
            where, line = x + 12, line + 1
        places.append((where, line))
        where += length
    left, right, top, bottom = x + 34, x + w - 14, y + 38, y + h - 34 - 16 * (line + 1)
    for (name, fill, _), (across, line) in zip(all_series, places, strict=True):
        down = bottom + 40 + 16 * line
        yield f'<rect x="{across}" y="{down - 4}" width="14" height="4" rx="2" fill="{fill}"/>'
        yield f'<text class="small" x="{across + 18}" y="{down + 1}">{escape(name)}</text>'

    moments = sorted({moment for _, _, points in all_series for moment, _ in points})
    base = dict.fromkeys(moments, 0.0)
    drawn = []
    for _, fill, points in all_series:
        lower = dict(base)
        upper = {moment: value + (lower[moment] if stacked else 0) for moment, value in points}
        if stacked:
            base |= upper
        drawn.append((fill, [(moment, lower[moment] if stacked else 0.0, value) for moment, value in upper.items()]))
    highest = max((value for _, areas in drawn for *_, value in areas), default=0) or 1
    step = round_up(highest * 1.02)
    if panel["fieldConfig"]["defaults"].get("decimals") == 0:
        step = max(step, 1)
    ceiling = step * math.ceil(highest * 1.02 / step)

    def at(moment: float, value: float) -> str:
        across = left + (moment - span[0]) / (span[1] - span[0]) * (right - left)
        return f"{across:.1f},{bottom - value / ceiling * (bottom - top):.1f}"

    for number in range(round(ceiling / step) + 1):
        down = at(span[0], number * step).split(",")[1]
        yield f'<path class="grid" d="M{left},{down} H{right}"/>'
        yield f'<text class="small end" x="{left - 6}" y="{float(down) + 4}">{number * step:g}</text>'
    every = 60 if w > 500 else 120
    for moment in range(math.ceil(span[0] / every) * every, int(span[1]), every):
        across = at(moment, 0).split(",")[0]
        yield f'<path class="grid" d="M{across},{top} V{bottom}"/>'
        label = time.strftime("%H:%M", time.gmtime(moment))
        yield f'<text class="small middle" x="{across}" y="{bottom + 17}">{label}</text>'

    for fill, areas in drawn:
        if custom["lineInterpolation"] == "stepAfter":
            areas = [one for old, new in pairwise(areas) for one in (old, (new[0], *old[1:]))] + areas[-1:]
        line_ = " L".join(at(moment, value) for moment, _, value in areas)
        back = " L".join(at(moment, value) for moment, value, _ in reversed(areas))
        opacity = custom["fillOpacity"] / 100
        yield f'<path d="M{line_} L{back} Z" fill="{fill}" fill-opacity="{opacity}"/>'
        yield f'<path d="M{line_}" fill="none" stroke="{fill}" stroke-width="{custom["lineWidth"] * 0.9}"/>'


def draw(found: dict[str, Any]) -> str:
    """Return the dashboard as SVG."""
    panels = prometheus.DASHBOARD["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    width, height = 24 * COLUMN + GAP, rows * ROW + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>",
        "text { font-family: 'DejaVu Sans', sans-serif; fill: #1b2430 }",
        ".title { font-size: 13px; font-weight: bold } .small { font-size: 11px; fill: #5b6675 }",
        ".figure { font-size: 34px; font-weight: bold; text-anchor: middle } .on { fill: #fff }",
        ".end { text-anchor: end } .middle { text-anchor: middle } .grid { stroke: #e4e7eb; fill: none }",
        ".panel { fill: #fff; stroke: #d5dae1 }",
        "</style>",
        f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>',
    ]
    for panel in panels:
        place = panel["gridPos"]
        box = (place["x"] * COLUMN + GAP, place["y"] * ROW + GAP, place["w"] * COLUMN - GAP, place["h"] * ROW - GAP)
        answers = {
            target["refId"]: found["answers"][f"{panel['title']}/{panel['type']}/{target['refId']}"]
            for target in panel["targets"]
        }
        if panel["type"] == "stat":
            parts += stat(panel, answers["A"], *box)
            continue
        series: list[Series] = []
        for target in panel["targets"]:
            for one in answers[target["refId"]]:
                name = named(target["legendFormat"], one["metric"])
                points = [(float(moment), float(value)) for moment, value in one["values"]]
                series.append((name, colour(panel, name, len(series)), points))
        parts += timeseries(panel, series, (found["begin"], found["end"]), box)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record"]:
            record()
        case ["draw"]:
            print(draw(json.load(sys.stdin)), end="")
