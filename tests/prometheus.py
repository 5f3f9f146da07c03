"""A real Prometheus, run as a process of ours and never as a service; and the expressions of our dashboard."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGING = Path(__file__).parents[1] / "packaging"
RULES = PACKAGING / "prometheus/uffdguard.rules.yml"
DASHBOARD: dict[str, Any] = json.loads((PACKAGING / "grafana/uffdguard.json").read_text())
#: How often it scrapes and evaluates the rules, in seconds.
INTERVAL = 1
#: What the hardened unit of docs/seeing.md leaves the exporter.
CONFINED = ("setpriv", "--bounding-set=-all,+sys_admin,+dac_override", "--inh-caps=-all", "--no-new-privs")
#: What Grafana would put in place of its variables; a rate is over four scrapes or more there.
VARIABLES = {"$instance": ".*", "$__rate_interval": f"{12 * INTERVAL}s"}


def expressions() -> dict[tuple[str, str, str], str]:
    """Return each expression of the dashboard, by the panel's title and kind and the target's name."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            found[panel["title"], panel["type"], target["refId"]] = text
    return found


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    url: str

    def get(self, path: str, **words: str | float) -> Any:
        """Return what its HTTP API answers.

        :raises RuntimeError: an error, in its own words.
        """
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(words)}") as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Return the value of each series of EXPRESSION now, by the values of its labels in their order by name."""
        return {
            tuple(
                value for name, value in sorted(one["metric"].items()) if name not in ("__name__", "instance", "job")
            ): (float(one["value"][1]))
            for one in self.get("query", query=expression)["result"]
        }


@contextlib.contextmanager
def served(where: str = "127.0.0.1:0") -> Iterator[str]:
    """Run ``uffdguard metrics --listen`` with what its unit leaves it; give its address and port."""
    command = [*CONFINED, sys.executable, "-m", "uffdguard", "metrics", "--listen", where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().removeprefix("http://").removesuffix("/metrics\n")
        finally:
            process.terminate()
            assert process.wait(60) == 0


def free_port() -> int:
    """Return a TCP port of the loopback that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run one that scrapes the address and port TARGET, with our rules, and keeps all it has in FOLDER."""
    configuration = {
        "global": {"scrape_interval": f"{INTERVAL}s", "evaluation_interval": f"{INTERVAL}s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "uffdguard", "static_configs": [{"targets": [target]}]}],
    }
    file = folder / "prometheus.yml"
    file.write_text(json.dumps(configuration))  # which is YAML too
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    with subprocess.Popen([*command, f"--web.listen-address={address}"]) as process:
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready"):
                    break
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()
