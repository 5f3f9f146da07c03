"""Put what belongs to a running system in place, and take away exactly that: units, configuration, pages, completion.

For an installation from the wheel; a distribution's package has its own ways.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from uffdguard import config, native_backend
from uffdguard.errors import Failure
from uffdguard.kernel import features, native
from uffdguard.policy import Backend, Mode
from uffdguard.steps import Steps, beside, write

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What was put in place: each path with the hash of what was written there.
MANIFEST = Path("/var/lib/uffdguard/installed.json")
UNITS = Path("/etc/systemd/system")
PAGES = Path("/usr/local/share/man")
COMPLETION = Path("/usr/local/share/bash-completion/completions/uffdguard")
#: What adds bpf to the LSMs, with the file that most of GRUB's configuration is in.
GRUB_FILE = features.GRUB_DROP_INS / "uffdguard.cfg"
GRUB = Path("/etc/default/grub")
#: The command that a distribution's package has, and that the units in the source name.
PACKAGED = "/usr/bin/uffdguard"

ENABLED = ("uffdguard.service", "uffdguard-knob.service", "uffdguard-log.service")
#: The last two are started by a failure of the first, and by the end of the second.
NAMES = (*ENABLED, "uffdguard-fallback.service", "uffdguard-uncover.service")

#: The steps of install and uninstall.
STEPS = Steps(
    (
        "list the files",
        "write a file",
        "list what is there",
        "enable the units",
        "update the boot loader",
        "disable the units",
        "remove a file",
        "remove the list",
    )
)
step = STEPS.take


class Installed(NamedTuple):
    """Which mode an install leaves for the next boot."""

    #: In the default configuration, which is what install writes.
    mode: Mode
    #: What an earlier install had written there; None: there was none.
    before: Mode | None
    #: What all configuration files together say.
    at_boot: Mode


def shared() -> Path:
    """Return the directory that has ``man`` and ``packaging``: in the wheel, else the source tree."""
    inside = Path(__file__).with_name("share")
    return inside if inside.exists() else Path(__file__).parents[2]


def files(command: Path, mode: Mode, completion: str) -> Iterator[tuple[Path, str]]:
    """Give each path with its text.

    :param command: what the units run.
    :param completion: the script for bash.
    """
    for name in NAMES:
        yield UNITS / name, (shared() / "packaging/systemd" / name).read_text().replace(PACKAGED, str(command))
    for page in sorted((shared() / "man").iterdir()):
        yield PAGES / f"man{page.suffix[1:]}" / page.name, page.read_text()
    yield COMPLETION, completion
    yield config.DEFAULT, f'# Put here by uffdguard install; {config.ADMINISTRATOR} wins.\nmode = "{mode}"\n'


def install(command: Path, mode: Mode | None, completion: str) -> Installed:
    """Put everything in place, in the stead of what an earlier install put there, and enable the units.

    :param mode: of the default configuration; None keeps what an earlier install wrote, else ``disabled``.
    :raises Failure: the kernel is too old, a file is there that is not ours or was changed since, or a configuration
        file is wrong, so that the next boot could not start; nothing is changed then.
    """
    native.need_root("installs")
    # Only the backend lsm needs it; what is wrong with a configuration file is said below.
    if features.configured_backend() is Backend.LSM:
        features.require(features.hook)
    known = _manifest()
    # Which files there are does not depend on the mode.
    there = [path for path, _ in files(command, Mode.DISABLED, completion) if path.exists()]
    foreign = [str(path) for path in there if _hash(path.read_bytes()) not in known.get(str(path), [])]
    if foreign:
        raise Failure(f"not put there by us, or changed since: {', '.join(foreign)}", "move it away and run it again")
    configured = config.load()
    configured.check(configured.backend)
    before = config.read(config.DEFAULT).mode if config.DEFAULT in there else None
    before = None if before is msgspec.UNSET else before
    mode = mode or before or Mode.DISABLED
    if configured.backend is Backend.NATIVE:
        native_backend.check_mode(mode)
    native.check_mode(mode)
    wanted = dict(files(command, mode, completion))
    hashes = {str(path): _hash(text.encode()) for path, text in wanted.items()}
    # At any time each file is there, the older or the newer, and listed: what is not would be somebody's.
    step("list the files")
    _list(known | {name: [*known.get(name, []), newer] for name, newer in hashes.items()})
    for path, text in wanted.items():
        step("write a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text)
    step("list what is there")
    _list(known | {name: [newer] for name, newer in hashes.items()})
    step("enable the units")
    _systemctl("daemon-reload")
    _systemctl("enable", *ENABLED)
    return Installed(mode, before, config.load().policy.mode)


def add_lsm() -> str | None:
    """Have GRUB boot with bpf among the LSMs, and change nothing else.

    :returns: the kernel's parameter, or None where bpf is among them already.
    :raises Failure: it cannot be done here; says what to do by hand.
    """
    native.need_root("changes the boot loader's configuration")
    features.require(features.hook)
    try:
        modules = (features.SECURITYFS / "lsm").read_text().strip()
    except OSError as error:
        raise Failure("cannot tell the LSMs: securityfs is not mounted", features.MOUNT_SECURITYFS) from error
    if "bpf" in modules.split(","):
        return None
    parameter = features.lsm_parameter(modules)
    update = shutil.which("update-grub")
    if not (features.GRUB_DROP_INS.is_dir() and update):
        missing = "update-grub" if features.GRUB_DROP_INS.is_dir() else features.GRUB_DROP_INS
        raise Failure(
            f"{missing} is not there: the boot loader is another one than Debian's GRUB",
            f"add {parameter} to the kernel's command line by hand, and reboot",
        )
    for path in (GRUB, *sorted(features.GRUB_DROP_INS.glob("*.cfg"))):
        # The last one on the command line would win, or ours would.
        if path != GRUB_FILE and path.exists() and re.search(r"^[^#\n]*\blsm=", path.read_text(), re.MULTILINE):
            raise Failure(f"{path} sets lsm= already", "add ,bpf to that by hand, run update-grub, and reboot")
    known = _manifest()
    name = str(GRUB_FILE)
    if GRUB_FILE.exists() and _hash(GRUB_FILE.read_bytes()) not in known.get(name, []):
        raise Failure(f"not put there by us, or changed since: {name}", "move it away and run it again")
    text = (
        "# Written by uffdguard install --lsm; uffdguard uninstall removes it.\n"
        f'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {parameter}"\n'
    )
    step("list the files")
    _list(known | {name: [*known.get(name, []), _hash(text.encode())]})
    step("write a file")
    write(GRUB_FILE, text)
    _update_grub()
    return parameter


def _update_grub() -> None:
    """Let GRUB take its configuration.

    :raises Failure: it does not.
    """
    step("update the boot loader")
    done = subprocess.run(["update-grub"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise Failure(f"update-grub failed: {''.join(last)}", "correct it and run it again")


def uninstall() -> list[str]:
    """Take everything away again, the policy too where systemd runs it.

    :returns: the paths that were left because somebody changed them.
    :raises Failure: nothing was installed.
    """
    native.need_root("uninstalls")
    known = _manifest()
    if not known:
        raise Failure("nothing was put in place by uffdguard install", "a package is removed by apt")
    # Where install --lsm was all, the units are those of a package.
    if any(str(UNITS / name) in known for name in ENABLED):
        step("disable the units")
        _systemctl("disable", "--now", *ENABLED)
    left = []
    for name, written in known.items():
        step("remove a file")
        path = Path(name)
        beside(path).unlink(missing_ok=True)
        if not path.is_file():
            continue
        if _hash(path.read_bytes()) in written:
            path.unlink()
        else:
            left.append(name)
    if str(GRUB_FILE) in known and shutil.which("update-grub"):
        _update_grub()
    step("remove the list")
    shutil.rmtree(MANIFEST.parent)
    _systemctl("daemon-reload")
    return left


def _list(files: dict[str, list[str]]) -> None:
    MANIFEST.parent.mkdir(parents=True, exist_ok=True)
    write(MANIFEST, json.dumps(files, indent=2) + "\n")


def _manifest() -> dict[str, list[str]]:
    """Return the path of each file that was put in place, and the hashes that it may have."""
    try:
        files = msgspec.json.decode(MANIFEST.read_bytes(), type=dict[str, list[str]])
        for name in files:
            if "\0" in name or not Path(name).is_absolute() or not Path(name).name:
                raise ValueError(f"{name!r} is no path of a file")
        return files
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, ValueError) as error:
        raise Failure(
            f"{MANIFEST} cannot be read: {error}", "remove it, and by hand what install put in place"
        ) from error


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _systemctl(*words: str) -> None:
    """Run systemctl where there is one; where systemd does not run it works on the files alone."""
    path = shutil.which("systemctl")
    if not Path("/run/systemd/system").exists():
        words = tuple(word for word in words if word != "--now")
        if words == ("daemon-reload",):
            return
    if path:
        done = subprocess.run([path, "--quiet", *words], capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"systemctl {' '.join(words)} failed: {done.stderr.strip()}", "see systemctl status")
