"""The blocks of the README that are executed on the machine itself, as they stand there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import readme

from uffdguard import config


def test_every_block_is_executed_by_a_test() -> None:
    known = {readme.DEMO, readme.TEST, readme.INSTALL, readme.DIALOGUE, readme.CONFIGURATION}
    assert {text for _, text in readme.BLOCKS} == known


@pytest.mark.timeout(600)
def test_make_demo_shows_what_the_readme_says_it_shows() -> None:
    out = subprocess.check_output(["sh", "-c", readme.DEMO], cwd=readme.ROOT, text=True)
    readme.check_demo(out)


def test_the_continuous_integration_calls_the_command_that_the_readme_gives() -> None:
    command = readme.TEST.split("#")[0].strip()
    assert command in (readme.ROOT / ".ci/run").read_text().splitlines()


def test_the_configuration_shown_is_what_holds_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = config.load()
    (tmp_path / "uffdguard.toml").write_text(readme.CONFIGURATION)
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "uffdguard.toml")
    # A file that says "deny" in so many words is not carried out by the backend native.
    assert config.load() == replace(without, denies_user_mode_only=True)
    assert tuple(tomllib.loads(readme.CONFIGURATION)) == config.File.__struct_encode_fields__


@pytest.mark.timeout(600)
def test_the_wheel_installs_and_works_where_there_is_no_compiler(tmp_path: Path) -> None:
    shutil.rmtree(readme.ROOT / "dist", ignore_errors=True)
    build, *install = readme.INSTALL.splitlines(keepends=True)
    subprocess.run(["sh", "-c", build], cwd=readme.ROOT, check=True)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cc", "clang", "gcc"):
        (tools / tool).write_text(f"#!/bin/sh\ntouch {tmp_path}/compiled; exit 1\n")
        (tools / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "prefix": str(tmp_path / "installed")}
    out = subprocess.check_output(["sh", "-ec", "".join(install)], cwd=readme.ROOT, env=environment, text=True)
    assert out.splitlines()[-1].startswith("uffdguard ")
    assert not (tmp_path / "compiled").exists()

    ours = Path(sys.executable).with_name("uffdguard")
    theirs = tmp_path / "installed/bin/uffdguard"
    script = f"rm -f /usr/bin/clang*; {theirs} start --mode kvm && {theirs} mode && {theirs} stop"
    done = subprocess.run([ours, "lab", "--", "sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "disabled enabled [kvm]\n")
