"""What is generated from conditions.py: the alerting rules, and the table of conditions in docs/seeing.md.

``.venv/bin/python tests/rules.py`` writes both. A unit test compares them with what is there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import prometheus

from uffdguard.conditions import CONDITIONS, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdguard.conditions import Condition, Severity

SEEING = Path(__file__).parents[1] / "docs/seeing.md"
TABLE = re.compile(r"(?<=<!-- tests/rules\.py -->\n).*?(?=<!-- end -->\n)", re.DOTALL)

#: The expressions of conditions that are not seen by their series alone.
EXPRESSIONS = {
    # There are no series of conditions where nothing was ever put in force, and none of this where nothing is known.
    "policy-answers": "uffdguard_in_force == 0",
    # These fail until a start takes note; an alert ends by itself.
    "hooks-not-skipped": "increase(uffdguard_hooks_skipped_total[10m]) > 0",
    "grants-not-lost": "increase(uffdguard_grants_lost_total[10m]) > 0",
}


class Alert(NamedTuple):
    """An alerting rule."""

    name: str
    expression: str
    severity: Severity
    #: What is wrong and what to do, without a full stop.
    wrong: str
    remedy: str

    def __str__(self) -> str:
        """Return it as YAML. A JSON string is one of YAML too."""
        # An increase lasts for the time that it looks back.
        waits = "" if "increase(" in self.expression else "        for: 1m\n"
        return (
            f"      - alert: {self.name}\n"
            f"        expr: {self.expression}\n"
            f"{waits}"
            f"        labels:\n"
            f"          severity: {self.severity}\n"
            f"        annotations:\n"
            f"          summary: {json.dumps(f'{self.wrong}, on {{{{ $labels.instance }}}}.')}\n"
            f"          description: {json.dumps(f'What to do: {self.remedy}. uffdguard status tells more.')}\n"
        )


#: What deserves attention although nothing is known to fail.
OTHERS = (
    Alert(
        "UffdguardCannotTell",
        'uffdguard_condition{condition="policy-answers"} == 0 unless ignoring (condition) uffdguard_in_force',
        "warning",
        "It cannot be told whether a policy for userfaultfd is in force",
        UNKNOWN,
    ),
    Alert(
        "UffdguardAudit",
        "uffdguard_audit == 1",
        "warning",
        "The policy for userfaultfd is in audit and lets refusals pass",
        "uffdguard start --enforce carries them out",
    ),
    Alert(
        "UffdguardSysctlRefused",
        "increase(uffdguard_sysctl_refused_total[10m]) > 0",
        "warning",
        "A write to a sysctl that would undo the policy was refused",
        "uffdguard watch and the journal tell which process wrote; take the line out of sysctl.d",
    ),
)


def alert(condition: Condition) -> Alert:
    """Return the alert of CONDITION."""
    expression = EXPRESSIONS.get(condition.name, f'uffdguard_condition{{condition="{condition.name}"}} == 0')
    return Alert(condition.alert, expression, condition.severity, condition.wrong, condition.remedy)


def rules() -> str:
    """Return packaging/prometheus/uffdguard.rules.yml."""
    alerts = [*map(alert, CONDITIONS), *OTHERS]
    return (
        "# Written by tests/rules.py, from src/uffdguard/conditions.py.\n"
        "groups:\n"
        "  - name: uffdguard\n"
        "    rules:\n" + "".join(map(str, alerts))
    )


def table() -> str:
    """Return the table of conditions."""
    return "".join(_rows())


def _rows() -> Iterator[str]:
    yield "| condition | severity | when it fails | what to do | alert |\n|---|---|---|---|---|\n"
    for condition in CONDITIONS:
        cells = (f"`{condition.name}`", condition.severity, condition.wrong, condition.remedy, f"`{condition.alert}`")
        yield f"| {' | '.join(cells)} |\n"


def seeing() -> str:
    """Return docs/seeing.md with the table as it must be."""
    return TABLE.sub(lambda _: table(), SEEING.read_text())


if __name__ == "__main__":
    prometheus.RULES.write_text(rules())
    SEEING.write_text(seeing())
