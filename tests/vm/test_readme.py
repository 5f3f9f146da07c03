"""The dialogue of the README, word for word, on a live kernel."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import readme
from inside import KVM_GROUP, USER


def test_the_dialogue_of_the_readme_is_what_happens() -> None:
    path = f"{Path(sys.executable).parent}:/usr/bin"
    for part in re.split(r"^(?=[#$] )", readme.DIALOGUE, flags=re.MULTILINE)[1:]:
        command, expected = part.split("\n", 1)
        user = USER if command.startswith("$") else 0
        done = subprocess.run(
            ["sh", "-c", command[2:]],
            user=user,
            group=user,
            extra_groups=[KVM_GROUP] if user else [],
            env={"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        pattern = ".*".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(pattern, done.stdout), f"{command}\n{done.stdout}"
