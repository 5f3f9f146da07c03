"""Show the main job: for each mode, what each user gets, and what QEMU gets. Run by ``make demo``, in the lab."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import postcopy
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from uffdguard.kernel import native

USER = 1000
KVM_GROUP = 36

#: The command beside this Python.
UFFDGUARD = Path(sys.executable).with_name("uffdguard")
MODES = ("disabled", "enabled", "kvm")
STYLES = {"allowed": "green", "completed": "green", "EPERM": "red", "refused": "red"}


@dataclass(frozen=True)
class Who:
    """A user who tries."""

    name: str
    uid: int
    groups: tuple[int, ...]


WHO = (
    Who("root", 0, ()),
    Who("user", USER, ()),
    Who("user in group kvm", USER, (KVM_GROUP,)),
)


def uffdguard(*arguments: str, who: Who = WHO[0]) -> str:
    """Run one of our commands as WHO and return what it printed."""
    identity: dict[str, Any] = {"user": who.uid, "group": who.uid, "extra_groups": who.groups}
    printed: str = subprocess.check_output([str(UFFDGUARD), *arguments], text=True, **identity)
    return printed


def cells(answers: dict[str, str]) -> tuple[str, str]:
    """Return what the ways got, at once and after opening /dev/kvm: one word where all got the same."""
    ways = ("syscall", "syscall-user-mode-only", "device")
    before, after = ([answers[way + when] for way in ways] for when in ("", "-after-kvm"))
    return " ".join(dict.fromkeys(before)), " ".join(dict.fromkeys(after))


def qemu() -> str:
    """Return what a QEMU of the user who may open /dev/kvm gets."""
    try:
        migration = postcopy.migrate(postcopy.Machine(USER, [KVM_GROUP]))
    except postcopy.Refused:
        return "refused"
    return f"completed, {migration.requests} faults"


def styled(text: str) -> str:
    """Return TEXT in its first word's colour."""
    style = STYLES.get(text.split()[0].rstrip(","), "")
    return f"[{style}]{text}[/]" if style else text


def main() -> None:
    """Try everything in each mode and print the table."""
    os.chown(native.DEV_KVM, 0, KVM_GROUP)
    native.DEV_KVM.chmod(0o660)
    # As some distributions have it; otherwise file permissions would hide what the policy says.
    native.DEV_USERFAULTFD.chmod(0o666)
    table = Table("who", "asks", *MODES)
    columns: list[list[str]] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(MODES) * (len(WHO) + 1))
        for mode in MODES:
            bar.update(task, description=f"mode {mode}")
            uffdguard(*(("mode", mode) if columns else ("start", "--mode", mode)))
            column: list[str] = []
            for who in WHO:
                column += cells(json.loads(uffdguard("probe", "--json", who=who)))
                bar.advance(task)
            columns.append([*column, qemu()])
            bar.advance(task)
    uffdguard("stop")
    questions = ("at once", "after opening /dev/kvm", "at once", "after EACCES from /dev/kvm")
    rows = list(zip(*columns, strict=True))
    for number, row in enumerate(rows[:-1]):
        first = number % 2 == 0
        name, question = WHO[number // 2].name if first else "", questions[number % len(questions)]
        table.add_row(name, question, *map(styled, row), end_section=not first)
    table.add_row("QEMU of that user", "for a postcopy migration", *map(styled, rows[-1]))
    console = Console(width=110, force_terminal="--colour" in sys.argv)
    console.print(f"uffdguard on a stock Linux {os.uname().release}:")
    console.print(table)
    console.print(
        "Each cell but QEMU's is three real tries: userfaultfd(2), the same with UFFD_USER_MODE_ONLY, and"
        " /dev/userfaultfd. In mode kvm who has opened /dev/kvm is allowed: an unedited QEMU can be migrated, and"
        " everybody else without privilege is refused.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
