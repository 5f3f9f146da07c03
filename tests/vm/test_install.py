"""install and uninstall on a root file system, whose changes are gone with the VM; systemd does not run here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from uffdguard import install


def test_install_enables_the_units_and_uninstall_leaves_nothing() -> None:
    command = Path(sys.executable).with_name("uffdguard")
    before = found()
    out = subprocess.check_output([command, "install", "--mode", "kvm"], text=True)
    assert "systemctl start uffdguard" in out
    enabled = subprocess.run(["systemctl", "is-enabled", *install.NAMES], capture_output=True, text=True)
    static = len(install.NAMES) - len(install.ENABLED)
    assert enabled.stdout.split() == ["enabled"] * len(install.ENABLED) + ["static"] * static
    again = subprocess.check_output([command, "install"], text=True)
    assert again.startswith("mode kvm in /usr/lib/uffdguard.toml, as before\n")
    assert 'mode = "kvm"' in Path("/usr/lib/uffdguard.toml").read_text()
    assert subprocess.run([command, "uninstall"]).returncode == 0
    assert found() == before


def found() -> set[str]:
    """Return the paths of our name outside of the checkout."""
    places = ["/etc/systemd", "/usr/lib/uffdguard.toml", "/usr/local/share", "/var/lib/uffdguard"]
    here = [place for place in places if Path(place).exists()]
    return set(subprocess.check_output(["find", *here, "-name", "*u*ffd*"], text=True).split())
