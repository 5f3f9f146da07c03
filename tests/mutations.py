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
    "nobody has the capability": {"return has_ptrace(cred) &&": "return 0 &&"},
    "a fork inherits the grant": {
        "static __always_inline int is_granted(": "struct task_struct___parent {\n\tstruct task_struct *real_parent;\n"
        "} __attribute__((preserve_access_index));\n\nstatic __always_inline int is_granted(",
        "return bpf_map_lookup_elem(&grants, &id) != NULL;": "struct task_struct___parent *child = (void *)task;\n"
        "\t__u64 parent = child->real_parent->mm->context.ctx_id;\n"
        "\treturn bpf_map_lookup_elem(&grants, &id) || bpf_map_lookup_elem(&grants, &parent);",
    },
    "an exec keeps the grant": {
        "__u64 id = task->mm->context.ctx_id;": "__u64 id = task->tgid;",
        "record(bpf_get_current_task_btf()->mm->context.ctx_id)": "record(bpf_get_current_task_btf()->tgid)",
        "id = mm->context.ctx_id;": "id = task->tgid;",
    },
}


def mutant(source: str, changes: dict[str, str]) -> str:
    """Return SOURCE with each text replaced, which it has once."""
    for text, by in changes.items():
        assert source.count(text) == 1, text
        source = source.replace(text, by)
    return source


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
    source = Path(features.__file__).with_name("guard.bpf.c").read_text()
    BUILD.mkdir(parents=True, exist_ok=True)
    unseen = 0
    for name, changes in MUTATIONS.items():
        path = BUILD / f"{name.replace(' ', '-')}.bpf.c"
        path.write_text(mutant(source, changes))
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
