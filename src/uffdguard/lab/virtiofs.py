"""virtiofsd, which gives a VM this machine's files where its kernel has no 9p. Debian has it since 13."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from uffdguard.lab.kernels import Apt, cache
from uffdguard.lab.processes import PATH, need, output

SUITE = "trixie"
#: With the libraries that an older Debian has not, or not new enough.
PACKAGES = ("virtiofsd", "libc6", "libcap-ng0", "libgcc-s1", "libseccomp2")
PLACE = "/usr/libexec"
#: Where this machine may have it.
PLACES = f"{PATH}:{PLACE}"

WRAPPER = """\
#!/bin/sh
root=$(dirname "$0")/..
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root{place}/virtiofsd" "$@"
"""


def directory() -> Path:
    """Return the directory that has virtiofsd: of this machine, or in the cache that of Debian 13, which is fetched.

    Raises:
        Failure: A tool or an archive is missing, a signature or a download is bad.
    """
    if found := shutil.which("virtiofsd", path=PLACES):
        return Path(found).parent
    root = cache() / "roots" / "virtiofsd"
    apt = Apt((SUITE,))
    with (apt.directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not root.exists():
            partial = root.with_name("virtiofsd.partial")
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "debs").mkdir(parents=True)
            apt.update()
            apt.download(PACKAGES, partial / "debs", "virtiofsd")
            for deb in (partial / "debs").glob("*.deb"):
                output([need("dpkg-deb", "dpkg"), "-x", deb, partial])
            shutil.rmtree(partial / "debs")
            (partial / "bin").mkdir()
            wrapper = partial / "bin/virtiofsd"
            wrapper.write_text(WRAPPER.format(place=PLACE))
            wrapper.chmod(0o755)
            partial.rename(root)
    return root / "bin"
