"""The page of report in a browser: hostile names are text, nothing is fetched, and it fits a narrow window."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from unit.test_journal import EVENT

from uffdguard import journal, page, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: What a script of a page that has the report in a frame of 400 pixels tells.
FRAME = """<!doctype html><iframe src="report.html" style="width:400px;height:600px;border:0" onload="
const page = this.contentDocument, body = page.body, found = {
  wide: page.documentElement.scrollWidth, visible: page.documentElement.clientWidth,
  right: Math.max(...[...page.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right)),
  small: Math.min(...[...page.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))),
  background: getComputedStyle(body).backgroundColor, ink: getComputedStyle(body).color,
  text: body.innerText,
};
document.body.textContent = JSON.stringify(found)"></iframe>"""


class Site(ThreadingHTTPServer):
    """Serves a directory, and knows what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Quiet(SimpleHTTPRequestHandler):
    """Writes nothing."""

    def log_message(self, format: str, *arguments: Any) -> None:
        assert isinstance(self.server, Site)
        self.server.asked.append(self.path)


class Elements(HTMLParser):
    """Which elements a page has, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def dom(tmp_path: Path) -> Callable[..., str]:
    """Return a function that gives a page as the browser has it after its scripts, if any ran."""

    def shown(address: str, *options: str) -> str:
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
        words = [*browser, "--virtual-time-budget=3000", *options, "--dump-dom", address]
        return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120).stdout

    return shown


def hostile(site: Site) -> list[str]:
    return [
        "<script>document.title='hacked'</script>",
        '"><img src=x onerror="document.title=`hacked`">',
        f"'><img src={site.address}/fetched>",
        f"</style><style>@import url({site.address}/imported)</style>",
        "</title></main><h1>new\nline",
        "\x1b[31mred\x1b]8;;http://example.com\x07",
    ]


def of(*names: str) -> report.Report:
    found = report.Report(user_mode_only=False)
    for number, name in enumerate(names):
        event = replace(EVENT, executable=name, exe_inode=number, user=name, unit=name)
        found.add(json.dumps({**journal.of_entry(event), "_UID": "0"}).encode())
    assert found.asked == len(names)
    return found


def test_hostile_names_are_text_and_nothing_runs_or_is_fetched(
    site: Site, dom: Callable[..., str], tmp_path: Path
) -> None:
    names = hostile(site)
    page.save(of(*names), str(tmp_path / "report.html"))
    html = dom(f"{site.address}/report.html")
    found = Elements(html)
    assert {"script", "img", "link", "h1"} & set(found.names) == {"h1"}
    assert found.names.count("style") == found.names.count("h1") == 1
    assert "<title>Who used userfaultfd on " in html
    for name in names:
        seen = name.replace("\n", r"\n").replace("\x1b", r"\x1b").replace("\x07", r"\x07")
        # As program, as user, as unit.
        assert found.text.count(seen) >= 3
    assert set(site.asked) <= {"/report.html", "/favicon.ico"}


def test_that_test_would_see_a_script_and_a_fetch_and_the_policy_of_the_page_stops_both(
    site: Site, dom: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "escape", lambda text: text)
    html = page.html(of(*hostile(site)))
    (tmp_path / "guarded.html").write_text(html)
    (tmp_path / "open.html").write_text(html.replace("Content-Security-Policy", "nothing"))
    assert "<title>hacked" in dom(f"{site.address}/open.html")
    assert {"/fetched", "/imported"} <= set(site.asked)
    site.asked.clear()
    guarded = dom(f"{site.address}/guarded.html")
    assert "img" in Elements(guarded).names
    assert "<title>hacked" not in guarded
    assert set(site.asked) <= {"/guarded.html", "/favicon.ico"}


def test_it_fits_a_narrow_window_and_follows_the_colour_scheme(
    site: Site, dom: Callable[..., str], tmp_path: Path
) -> None:
    page.save(of(*hostile(site), "/" + "long/" * 100), str(tmp_path / "report.html"))
    (tmp_path / "frame.html").write_text(FRAME)
    seen = []
    for scheme in ("1", "0"):  # light, dark
        told = dom(f"{site.address}/frame.html", f"--blink-settings=preferredColorScheme={scheme}")
        seen.append(json.loads(Elements(told).text))
    light, dark = seen
    for found in seen:
        assert found["wide"] == found["visible"] <= 400
        assert found["right"] <= found["visible"]
        assert found["small"] >= 12
        assert "disabled would have refused 7 programs" in found["text"]
    assert (light["background"], light["ink"]) == ("rgb(244, 246, 249)", "rgb(27, 36, 48)")
    assert (dark["background"], dark["ink"]) == ("rgb(14, 19, 26)", "rgb(231, 235, 241)")
