"""metrics on a live kernel, scraped by a real Prometheus."""

from __future__ import annotations

import functools
import subprocess
from typing import TYPE_CHECKING

import prometheus
import pytest
from inside import actor, uffdguard, until, waiting_actor

from uffdguard import state
from uffdguard.conditions import CONDITIONS
from uffdguard.policy import Backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def scraper(tmp_path: Path) -> Iterator[prometheus.Prometheus]:
    with prometheus.served() as target, prometheus.scraping(target, tmp_path) as found:
        until(lambda: found.query("up") == {(): 1})
        yield found


def test_prometheus_has_what_was_decided(in_force: Callable[..., None], scraper: prometheus.Prometheus) -> None:
    assert scraper.query("uffdguard_in_force") == {(): 0}
    assert scraper.query("uffdguard_decisions_total") == {}
    in_force("kvm", user_mode_only=True)
    until(lambda: scraper.query("sum(uffdguard_decisions_total)") == {(): 0})
    with waiting_actor("open:/dev/kvm", "syscall", "syscall", "wait") as go_on:
        assert actor(*["syscall"] * 3, "syscall:1") == [*["EPERM"] * 3, "allowed"]
        assert actor(*["syscall"] * 5, user=0) == ["allowed"] * 5
        until(lambda: scraper.query("sum(uffdguard_decisions_total)") == {(): 11})
        assert scraper.query("uffdguard_decisions_total > 0") == {
            ("capability", "allowed"): 5,
            ("user-mode-only", "allowed"): 1,
            ("kvm", "allowed"): 2,
            ("no-kvm", "refused"): 3,
        }
        assert scraper.query("uffdguard_grants") == {(): 1}
        assert scraper.query("uffdguard_mode == 1") == {("kvm",): 1}
        assert scraper.query("uffdguard_user_mode_only") == {(): 1}
        go_on()
    until(lambda: scraper.query("uffdguard_grants") == {(): 0})
    assert scraper.get("alerts")["alerts"] == []

    # So that something fails, of which there is an expression.
    state.FOUND.unlink()
    until(lambda: scraper.query("uffdguard_condition == 0") == {("found-recorded",): 0})

    def has_a_value(expression: str) -> bool:
        return bool(scraper.get("query", query=expression)["result"])

    for (panel, kind, _), expression in prometheus.expressions().items():
        print(f"{panel}: {expression}")
        # A scrape that a busy machine does not answer in time leaves every series without a value until the next.
        until(functools.partial(has_a_value, expression))
        assert kind in ("stat", "timeseries")


def test_a_condition_and_the_end_of_the_policy_are_seen_and_alert(
    in_force: Callable[..., None], scraper: prometheus.Prometheus
) -> None:
    def alerts() -> set[str]:
        return {alert["labels"]["alertname"] for alert in scraper.get("alerts")["alerts"]}

    in_force("kvm")
    actor("syscall")
    until(lambda: scraper.query("sum(uffdguard_decisions_total)") == {(): 1} and not alerts())
    asked = {(condition.name,) for condition in CONDITIONS if Backend.LSM in condition.backends}
    assert set(scraper.query("uffdguard_condition == 1")) == asked
    state.FOUND.unlink()
    until(lambda: scraper.query("uffdguard_condition == 0") == {("found-recorded",): 0})
    assert scraper.query("uffdguard_problems") == {(): 1}
    until(lambda: alerts() == {"UffdguardFoundLost"})
    in_force("kvm")
    until(lambda: not alerts())
    (state.PINS / "decide").unlink()
    until(lambda: scraper.query("uffdguard_in_force") == {(): 0})
    assert scraper.query("uffdguard_decisions_total") == {}
    assert scraper.query("uffdguard_problems > 0")
    until(lambda: "UffdguardNotInForce" in alerts())
    in_force("kvm")
    until(lambda: scraper.query("uffdguard_in_force") == {(): 1} and not alerts())
    assert scraper.query("uffdguard_problems") == {(): 0}


def test_promtool_has_nothing_to_say_about_the_metrics_of_each_state(in_force: Callable[..., None]) -> None:
    def check() -> str:
        outcome = uffdguard("metrics")
        assert (outcome.status, outcome.err) == (0, "")
        done = subprocess.run(["promtool", "check", "metrics"], input=outcome.out, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return outcome.out

    assert "\nuffdguard_in_force 0.0\n" in check()
    in_force("kvm")
    assert '\nuffdguard_mode{mode="kvm"} 1.0\n' in check()
    (state.PINS / "grants").unlink()
    assert '\nuffdguard_condition{condition="pins-complete"} 0.0\n' in check()
    for pin in state.PINS.iterdir():
        pin.unlink()
    assert '\nuffdguard_condition{condition="pins-complete"} 0.0\n' in check()
    in_force("kvm")
