"""The interface file: ``/proc/sys/vm/unprivileged_userfaultfd`` as the 2019 patch had it, served by FUSE.

The server has no capability. It opens /dev/fuse and waits; who may mount, the service manager's post step or
:func:`run`, takes that descriptor from it and mounts the file. It holds references to all that is pinned, so that
pins removed by accident change nothing, and once a second sees the policy refuse.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffdguard import guard, state
from uffdguard.errors import Failure
from uffdguard.kernel import layout, libbpf, native
from uffdguard.policy import Mode, Policy, Reason, interface_line
from uffdguard.proof import Asker

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("uffdguard")

FILE = Path("/proc", native.KNOB)
#: What the mount table calls a mount of ours.
KIND = "fuse.uffdguard"
#: The running server holds a lock on this file, which has its pid.
SERVER = native.RUN / "knob"
#: Longer than any word with blanks around it has reason to be.
LONGEST = 64
#: Seconds between two looks whether the policy still refuses.
INTERVAL = 1.0
NUMBERS = {"0": Mode.DISABLED, "1": Mode.ENABLED}


def parse(data: bytes, words: tuple[Mode, ...], *, numeric: bool = False) -> Mode:
    """Return the mode that a write of DATA asks for.

    :param words: the modes that exist.
    :param numeric: whether mainline's ``0`` and ``1`` are words too.
    :raises ValueError: it is none of the words; the kernel's own files answer EINVAL.
    """
    text = data.decode("ascii").strip() if len(data) <= LONGEST else ""
    if numeric and text in NUMBERS:
        return NUMBERS[text]
    mode = Mode(text)
    if mode not in words:
        raise ValueError(text)
    return mode
