"""What keeps a ``kill -9`` harmless: named steps, at which tests kill, and files that are never half written."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from uffdguard.errors import Failure

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("uffdguard")


class Steps(tuple[str, ...]):
    """The steps of one part of the program, by name and in their order."""

    def take(self, name: str) -> None:
        """Say in the log that the step NAME is about to be taken."""
        if name not in self:
            raise ValueError(name)
        log.debug("%s", name)


def beside(path: Path) -> Path:
    """Return where :func:`write` has a file before it is whole; a kill may leave that."""
    return path.with_name(f"{path.name}.new")


def write(path: Path, text: str) -> None:
    """Write a file that all may read, whatever the umask is, so that it is there whole or not at all.

    :raises Failure: it cannot be written, e.g. because the file system is full.
    """
    try:
        beside(path).unlink(missing_ok=True)
        # Nor through a link that another user has put there.
        with beside(path).open("x") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        beside(path).rename(path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}", "make it possible and run it again") from error
    finally:
        beside(path).unlink(missing_ok=True)
