"""Fuzz the targets, one after the other, and print a table: ``python -m fuzz.run SECONDS [TARGET...]``.

Below ``build/fuzz`` each target has its log, the corpus that grows from run to run, and each input that broke a
promise. Exits with 1 when there is one. ``python -m fuzz.run TARGET FILE`` tries one input.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "tests/fuzz/seeds"
BUILD = ROOT / "build/fuzz"
ROW = "{:15}{:>10}{:>8}{:>16}{:>11}{:>9}{:>7}"
#: What libFuzzer exits with: FuzzerOptions.h
CRASH, HANG = 77, 70


def fuzz(name: str, options: list[str]) -> None:
    """Be libFuzzer with one target."""
    import atheris

    with atheris.instrument_imports(include=["uffdguard", "tomllib", "click"]):
        from fuzz import targets

        from uffdguard.kernel import native
    # Below the targets' own watch: whatever they call, no file elsewhere is changed.
    native.drop_capabilities()
    native.restrict_writes(dict.fromkeys((targets.scratch().parent, BUILD), native.Access.ANY))
    atheris.Setup([name, *options], targets.TARGETS[name])
    atheris.Fuzz()


def run(name: str, seconds: int) -> bool:
    """Run one target in a process of its own, print its row, and return whether all went well."""
    corpus, log = BUILD / name, BUILD / f"{name}.log"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=10", "-max_len=8192", "-print_final_stats=1"]
    options += [f"-artifact_prefix={BUILD}/{name}-", str(corpus), str(SEEDS / name)]
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as scratch, log.open("wb") as file:
        environment = os.environ | {"TMPDIR": scratch}
        status = subprocess.run(
            [sys.executable, "-m", "fuzz.run", name, *options], stdout=file, stderr=file, env=environment
        ).returncode
    text = log.read_text(errors="replace")
    stats = dict(re.findall(r"^stat::(\w+): +(\d+)", text, re.MULTILINE))
    coverage = re.findall(r"cov: (\d+)", text)
    runs, rate, units = (
        stats.get(key, "?") for key in ("number_of_executed_units", "average_exec_per_sec", "new_units_added")
    )
    grown = f"{coverage[0]} to {coverage[-1]}" if coverage else "?"
    print(ROW.format(name, runs, rate, grown, units, int(status == CRASH), int(status == HANG)), flush=True)
    if status:
        print(*re.findall(r"(?ms)^ === Uncaught Python exception.*?(?=^==\d)|^ALARM.*?$", text), sep="\n")
        print(
            *re.findall(r"Test unit written to .*", text) or [f"exit status {status}: see {log}"], sep="\n", flush=True
        )
    elif not coverage:
        print(f"{name}: not instrumented, so tried at random: see {log}")
    return status == 0 and bool(coverage)


def main(words: list[str]) -> None:
    if not words[0].isdigit():
        fuzz(words[0], words[1:])
    names = words[1:] or sorted(path.name for path in SEEDS.iterdir())
    print(ROW.format("target", "runs", "runs/s", "coverage", "new units", "crashes", "hangs"), flush=True)
    failed = [name for name in names if not run(name, int(words[0]))]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
