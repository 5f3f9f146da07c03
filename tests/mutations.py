"""Faults put into guard.bpf.c, one at a time, and the tests that see each: ``make test-mutations``.

Usage: ``mutations.py COMMAND...``, which runs the command that is added to it in the lab. Exits with 1 where no test
sees a fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hatch_build
from uffdguard.kernel import features

TESTS = ("tests/vm/test_decision.py", "tests/vm/test_model.py")
BUILD = Path("build/mutations")

#: What is replaced, and by what.
MUTATIONS = {
    "the capability in any user namespace": {
        " || is_initial(cred->user_ns));": " || is_initial(cred->user_ns) || 1);",
    },
    "a user namespace that was refused once is taken for the initial one": {
        "if (ns->level != 0)\n\t\treturn 0;\n\tseen_initial = ns;": "seen_initial = ns;\n"
        "\tif (ns->level != 0)\n\t\treturn 0;",
    },
    "nobody has the capability": {"return has_capability(cred, CAP_SYS_PTRACE) &&": "return 0 &&"},
    "a fork inherits the grant": {
        "\t\tif (!(i ? shares_mm(task, mm) : parent_shares_mm(task, mm)))\n\t\t\treturn 0;\n": "",
        "return shares_mm(task, mm);": "return 1;",
    },
    "an exec keeps the grant: the id is not compared": {
        "return grant && *grant == exec_id + 1;": "return grant && *grant;",
    },
    "the parent is not asked": {
        "|| ancestor_of_current_has_opened_kvm();": "|| (0 && ancestor_of_current_has_opened_kvm());",
    },
    "the parent is not granted": {"if (i == 0 && !parent_shares_mm(task, mm))": "if (i == 0)"},
    "the grant is the thread's and not its leader's": {
        "bpf_task_storage_get(&grants, task->group_leader, 0, 0)": "bpf_task_storage_get(&grants, task, 0, 0)",
        "bpf_task_storage_get(&grants, task->group_leader, 0, BPF_": "bpf_task_storage_get(&grants, task, 0, BPF_",
    },
}


def source() -> str:
    """Return guard.bpf.c with grants.h in it."""
    folder = Path(features.__file__).parent
    include = '#include "grants.h"\n'
    text = (folder / "guard.bpf.c").read_text()
    assert text.count(include) == 1
    return text.replace(include, (folder / "grants.h").read_text())


def mutant(changes: dict[str, str]) -> str:
    """Return the source with each text replaced, which it has once."""
    changed = source()
    for text, by in changes.items():
        assert changed.count(text) == 1, text
        changed = changed.replace(text, by)
    return changed


def failing(command: list[str], log: Path) -> Counter[str]:
    """Return the tests that fail, and how many cases of each; see that others pass, so it was in force."""
    with log.open("wb") as file:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    text = log.read_text(errors="replace")
    if not re.search(r"^=* ?(\d+ failed, )?\d+ passed", text, re.MULTILINE):
        sys.exit(f"the tests did not run: see {log}")
    return Counter(re.findall(r"^FAILED \S*::([\w:]+)", text, re.MULTILINE))


def main(lab: list[str]) -> None:
    """Try each, and print a table."""
    BUILD.mkdir(parents=True, exist_ok=True)
    unseen = 0
    for name, changes in MUTATIONS.items():
        path = BUILD / f"{name.replace(' ', '-')}.bpf.c"
        path.write_text(mutant(changes))
        hatch_build.compile_bpf(path, path.with_suffix(".o"))
        pytest = [f"{sys.prefix}/bin/pytest", "--mutant", str(path.with_suffix(".o").resolve()), *TESTS]
        tests = failing([*lab, *pytest], path.with_suffix(".log"))
        unseen += not tests
        print(f"{name}: {tests.total() or 'NO'} cases fail", flush=True)
        for test, number in tests.items():
            print(f"    {test}{f' ({number})' if number > 1 else ''}", flush=True)
    sys.exit(unseen > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
