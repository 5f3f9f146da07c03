"""Where the policy comes from: TOML files, of which the later wins.

``/usr/lib/uffdguard.toml`` is the distribution's default, ``/etc/uffdguard.toml`` the administrator's, and the
drop-ins ``/etc/uffdguard.d/*.toml`` follow in the order of their names. No file: ``disabled``, ``deny``.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from uffdguard.errors import Failure
from uffdguard.policy import Backend, Mode, Policy

DEFAULT = Path("/usr/lib/uffdguard.toml")
ADMINISTRATOR = Path("/etc/uffdguard.toml")
DROP_INS = Path("/etc/uffdguard.d")

#: A second, of one user; see guard.EVENTS_PER_SECOND for all together.
MOST_EVENTS = 200


class File(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """What one file may say; what it leaves out it leaves as it is."""

    mode: Mode | msgspec.UnsetType = msgspec.UNSET
    user_mode_only: Literal["deny", "allow"] | msgspec.UnsetType = msgspec.UNSET
    numeric: Literal["refuse", "accept"] | msgspec.UnsetType = msgspec.UNSET
    enforce: bool | msgspec.UnsetType = msgspec.UNSET
    events_per_second: Annotated[int, msgspec.Meta(ge=0, le=MOST_EVENTS)] | msgspec.UnsetType = msgspec.UNSET
    backend: Backend | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class Configuration:
    """What all files together say."""

    policy: Policy
    #: Whether the interface file takes mainline's ``0`` and ``1``, too.
    numeric: bool
    #: How many events a second one user may cause.
    events_per_second: int
    #: What carries the policy out where none is in force yet.
    backend: Backend = Backend.LSM
    #: Whether a file says ``user-mode-only = "deny"``, which is the default, in so many words.
    denies_user_mode_only: bool = False

    def check(self, backend: Backend) -> None:
        """Make sure that BACKEND can keep what the files say in so many words.

        :raises Failure: it cannot.
        """
        if backend is not Backend.NATIVE:
            return
        if self.denies_user_mode_only:
            raise Failure(
                'the backend native cannot keep user-mode-only = "deny": the kernel lets UFFD_USER_MODE_ONLY pass',
                'say "allow" in the configuration, or use the backend lsm',
            )
        if self.policy.audit:
            raise Failure(
                "the backend native cannot keep enforce = false: it sees no call that it could let pass",
                "say enforce = true in the configuration, or use the backend lsm",
            )


def files() -> list[Path]:
    """Return the files that exist, in the order in which they are read."""
    return [path for path in (DEFAULT, ADMINISTRATOR, *sorted(DROP_INS.glob("*.toml"))) if os.path.lexists(path)]


def load() -> Configuration:
    """Return what the files ask for.

    :raises Failure: a file cannot be read or says what it may not; names the file, the line and the key.
    """
    said: dict[str, Any] = {}
    for path in files():
        said |= {key: value for key, value in msgspec.structs.asdict(read(path)).items() if value is not msgspec.UNSET}
    policy = Policy(
        said.get("mode", Mode.DISABLED), said.get("user_mode_only") == "allow", audit=not said.get("enforce", True)
    )
    return Configuration(
        policy,
        said.get("numeric") == "accept",
        said.get("events_per_second", 20),
        said.get("backend", Backend.LSM),
        said.get("user_mode_only") == "deny",
    )


def read(path: Path) -> File:
    """Read one file.

    :raises Failure: as :func:`load`.
    """
    hint = "correct it and run the command again; nothing was changed"
    try:
        # Not by read_text(), which takes the locale's encoding, and a carriage return for the end of a comment.
        text = path.read_bytes().decode()
        return msgspec.convert(tomllib.loads(text), File)
    except tomllib.TOMLDecodeError as error:
        raise Failure(f"{path}: not TOML: {error}", hint) from error
    except msgspec.ValidationError as error:
        key, what = _key_and_reason(str(error))
        where = re.search(rf"""^[ \t\[]*['"]?{re.escape(key)}\b""", text, re.MULTILINE)
        # A key that is written with escapes is not found.
        line = f", line {text.count(chr(10), 0, where.start()) + 1}" if where else ""
        raise Failure(f"{path}{line}: {key}: {what}", hint) from error
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: not TOML: not UTF-8", hint) from error
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: a number too long or a nesting too deep", hint) from error
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", hint) from error


def _key_and_reason(message: str) -> tuple[str, str]:
    """Take msgspec's message apart, and say which words there are."""
    words: dict[str, list[str]] = {
        "mode": [*Mode],
        "user-mode-only": ["deny", "allow"],
        "numeric": ["refuse", "accept"],
        "enforce": ["true", "false"],
        "events-per-second": [],
        "backend": [*Backend],
    }
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
        return unknown[1], f"no such key; there are {', '.join(words)}"
    key = message.rsplit("$.", 1)[-1].rstrip("`")
    if key == "events-per-second":
        return key, f"must be a number from 0 to {MOST_EVENTS}"
    quoted = "" if key == "enforce" else ", in quotes"
    return key, f"must be one of {', '.join(words.get(key, []))}{quoted}"
