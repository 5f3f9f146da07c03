"""The kernels of the lab: which lines there are, which are cached, fetching one from the Debian archive."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uffdguard.errors import Failure
from uffdguard.lab.architectures import AMD64, ARCHITECTURES, ARM64, Architecture, of_release
from uffdguard.lab.processes import need, output, process_group, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


@dataclass(frozen=True)
class Line:
    """A kernel line, the suites of the Debian archive that carry it, and where the policy can be in force on it."""

    name: str
    suites: tuple[str, ...]
    architectures: tuple[Architecture, ...] = (AMD64, ARM64)

    def supported(self, architecture: Architecture = AMD64) -> bool:
        """Whether the policy can be in force on this line of ARCHITECTURE."""
        return architecture in self.architectures


#: Lines that the archive carries, oldest first: what the lab boots, `make test` and `make test-matrix` try, and
#: docs/kernels.md tells of. The last is whatever is newer than the others: its number is known from the archive only.
LINES = (
    Line("5.10", ("bullseye", "bullseye-security"), ()),
    # Without DYNAMIC_FTRACE_WITH_DIRECT_CALLS, since 6.4 on arm64, LSM programs cannot be attached.
    Line("6.1", ("bookworm", "bookworm-security"), (AMD64,)),
    Line("6.12", ("trixie", "trixie-security", "bookworm-security")),
    *(Line(name, ("trixie-backports",)) for name in ("6.18", "7.0", "7.x")),
)
*_, BEFORE_NEWEST, NEWEST = LINES

#: Debian's other builds of a line: the preemptible one, and the one for virtual machines.
FLAVOURS = tuple(
    replace(line, name=f"{line.name}-{flavour}")
    for line in LINES
    if line.name in ("6.12", NEWEST.name)
    for flavour in ("rt", "cloud")
)


def oldest(architecture: Architecture = AMD64) -> Line:
    """Return the oldest line on which the policy can be in force."""
    return next(line for line in LINES if line.supported(architecture))


#: A release of a kernel, as ``uname -r`` prints it.
RELEASE = re.compile(rf"\d+\.\d+\.\d+(?:\+[a-z]+[\d.]+|-\d+)?(?:-rt|-cloud)?-(?:{'|'.join(ARCHITECTURES)})", re.ASCII)

#: The package of the image, without the unsigned and the debugging ones.
IMAGE = re.compile(rf"linux-(?:image|binary)-({RELEASE.pattern})", re.ASCII)

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

#: Read after the machine's own configuration, which may name a proxy. Its hooks are not for us: some delete
#: the machine's downloaded packages.
APT_CONF = """\
Dir::State::lists "{directory}/lists";
Dir::Cache "{directory}/cache";
APT::Architecture "{architecture}";
APT::Architectures "{architecture}";
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
NOT_THE_MACHINES = ("Dir::Etc::sourceparts", "Dir::Etc::preferences", "Dir::Etc::preferencesparts")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache: its release as ``uname -r`` prints it, and the directory it is unpacked in."""

    release: str
    directory: Path

    @property
    def architecture(self) -> Architecture:
        """The architecture that it is for."""
        return of_release(self.release)

    @property
    def image(self) -> Path:
        """What QEMU boots; ``lib/modules/RELEASE`` of the same directory has the modules."""
        image = self.directory / "boot" / f"vmlinuz-{self.release}"
        return image if image.exists() else self.directory / "lib/modules" / self.release / "vmlinuz"


def cache() -> Path:
    """Return the directory of everything that is fetched; a user may remove any of it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "uffdguard").absolute()


def without_architecture(release: str) -> str:
    """Return RELEASE, or the name of a line, without the architecture that it may end in."""
    head, _, tail = release.rpartition("-")
    return head if tail in ARCHITECTURES else release


def version(release: str) -> tuple[int, ...]:
    """Return the numbers in RELEASE, to compare by."""
    return tuple(map(int, re.findall(r"\d+", without_architecture(release))))


def flavour(release: str) -> str:
    """Return what RELEASE, or the name of a line, has for its flavour: ``-rt``, ``-cloud`` or nothing."""
    head, _, tail = without_architecture(release).rpartition("-")
    return f"-{tail}" if head and tail in ("rt", "cloud") else ""


def line_name(release: str) -> str:
    """Return the name of the line that RELEASE belongs to."""
    return "{}.{}".format(*version(release)) + flavour(release)


def belongs(release: str, line: Line) -> bool:
    """Whether RELEASE is one of LINE."""
    if line.name.startswith(NEWEST.name):
        newer = version(release)[:2] > version(BEFORE_NEWEST.name)
        return newer and flavour(release) == flavour(line.name)
    return line_name(release) == line.name


def find_line(word: str, architecture: Architecture = AMD64) -> Line:
    """Return the line that WORD names: ``6.12``, ``6.12-rt``, ``7.3``, ``oldest``, ``newest``.

    Raises:
        Failure: There is no such line.
    """
    words = {line.name: line for line in (*LINES, *FLAVOURS)} | {"oldest": oldest(architecture), "newest": NEWEST}
    if word in words:
        return words[word]
    if re.fullmatch(r"[0-9]{1,3}\.[0-9]{1,3}(-rt|-cloud)?", word):
        for line in (NEWEST, *FLAVOURS):
            if belongs(word, line):
                return replace(line, name=word)
    raise Failure(f"lab: there is no kernel line {word!r}", "see `uffdguard lab kernels`")


def cached(line: Line, architecture: Architecture = AMD64) -> Kernel | None:
    """Return the highest kernel of LINE of ARCHITECTURE in the cache, or None."""
    found = (path for path in cache().glob("kernels/*/*") if RELEASE.fullmatch(path.name))
    paths = (path for path in found if of_release(path.name) == architecture and belongs(path.name, line))
    path = max(paths, key=lambda path: version(path.name), default=None)
    return Kernel(path.name, path) if path else None


def table(architecture: Architecture = AMD64) -> Iterator[tuple[str, bool, str | None]]:
    """Give each line's name, whether it is supported, and the release that is cached or None. Uses no network."""
    for line in (*LINES, *FLAVOURS):
        kernel = cached(line, architecture)
        name = line_name(kernel.release) if kernel else line.name
        if line.name.startswith(NEWEST.name) and not kernel:
            # Lists that are already here tell its number.
            with contextlib.suppress(Failure):
                name = line_name(choose(Apt(line.suites, architecture).names(), line, architecture)[0])
        yield name, line.supported(architecture), kernel.release if kernel else None


def get(word: str, architecture: Architecture = AMD64) -> Kernel:
    """Return the cached kernel of the line that WORD names, of ARCHITECTURE; without one, fetch the highest there is.

    Raises:
        Failure: The machine is not x86-64, there is no such line, or it could not be fetched.
    """
    if platform.machine() != "x86_64":
        raise Failure(f"lab: the machine must be x86-64, this one is {platform.machine()}")
    line = find_line(word, architecture)
    return cached(line, architecture) or fetch(line, architecture)


def fetch(line: Line, architecture: Architecture = AMD64) -> Kernel:
    """Fetch the highest kernel of LINE of ARCHITECTURE from the machine's Debian archive into the cache.

    Raises:
        Failure: A tool or an archive is missing, a signature or a download is bad.
    """
    depmod = need("depmod", "kmod")
    apt = Apt(line.suites, architecture)
    with (apt.directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Another lab may have fetched it while this one waited for the lock.
        if kernel := cached(line, architecture):
            return kernel
        apt.update()
        names = apt.names()
        release, packages = choose(names, line, architecture)
        partial = apt.directory / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            (partial / "root").mkdir(parents=True)
            what = f"Linux {without_architecture(release)} for {architecture.name}"
            apt.download([name for name in packages if name in names], partial, what)
            if not set(packages) <= set(names):
                apt.download_modules(partial, what)
            for package in partial.glob("*.deb"):
                unpack(package, partial / "root", release)
            # Builds of kmod differ in whether they look below /lib or below /usr/lib.
            if (partial / "root/lib").exists():
                (partial / "root/usr/lib").mkdir(parents=True, exist_ok=True)
                (partial / "root/usr/lib/modules").symlink_to("../../lib/modules")
            else:
                (partial / "root/lib").symlink_to("usr/lib")
            output([depmod, "-b", partial / "root", release])
            kernel = Kernel(release, cache() / "kernels" / line_name(release) / release)
            kernel.directory.parent.mkdir(parents=True, exist_ok=True)
            (partial / "root").rename(kernel.directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return kernel


def unpack(package: Path, directory: Path, release: str) -> None:
    """Unpack a PACKAGE; of one of modules, for which nothing may vouch, modules alone: no kernel, no link away."""
    dpkg_deb = need("dpkg-deb", "dpkg")
    if not package.name.startswith("linux-modules-"):
        output([dpkg_deb, "-x", package, directory])
        return
    archive = package.with_suffix(".tar")
    with archive.open("wb") as file:
        subprocess.run([dpkg_deb, "--fsys-tarfile", package], stdout=file, check=True)
    with tarfile.open(archive) as members:
        inside = re.compile(rf"(\./)?(usr/)?lib/modules/{re.escape(release)}/(kernel/.*\.ko(\.xz)?|modules\.[a-z.]+)")
        for member in members:
            if member.isfile() and inside.fullmatch(member.name) and ".." not in member.name:
                members.extract(member, directory)
    archive.unlink()


def choose(names: Iterable[str], line: Line, architecture: Architecture = AMD64) -> tuple[str, list[str]]:
    """Return the highest release of LINE of ARCHITECTURE that NAMES of packages offer, and the packages it consists of.

    Raises:
        Failure: There is none.
    """
    found = [match[1] for match in map(IMAGE.fullmatch, names) if match]
    releases = [release for release in found if of_release(release) == architecture and belongs(release, line)]
    if not releases:
        raise Failure(f"lab: the Debian archive has no Linux {line.name} in {', '.join(line.suites)}")
    release = max(releases, key=version)
    kinds = ("binary", "modules") if version(release) >= (6, 19) else ("image",)
    return release, [f"linux-{kind}-{release}" for kind in kinds]


def archives(targets: str) -> dict[str, str]:
    """Return label -> URI of the Debian archives among TARGETS (``URI|ORIGIN|LABEL`` a line)."""
    found: dict[str, str] = {}
    # The labels of other archives may have a bar in them.
    for uri, label in re.findall(r"^([^|\n]*)\|Debian\|(.*)$", targets, re.MULTILINE):
        if not uri.startswith("cdrom:"):
            found.setdefault(label, uri)
    return found


def sources(uris: dict[str, str], suites: Iterable[str], architecture: Architecture = AMD64) -> str:
    """Return the sources.list of SUITES; without the security ones when the machine has no URI for them."""
    labelled = {suite: "Debian-Security" if suite.endswith("-security") else "Debian" for suite in suites}
    options = f"[arch={architecture.name} signed-by={KEYRING} target=Packages]"
    return "".join(f"deb {options} {uris[b]} {a} main\n" for a, b in labelled.items() if b in uris)


class Apt:
    """apt with directories of its own in the cache: it needs no root and changes nothing of the machine."""

    def __init__(self, suites: tuple[str, ...], architecture: Architecture = AMD64) -> None:
        self.suites = suites
        self.architecture = architecture
        other = () if architecture == AMD64 else (architecture.name,)
        self.directory = cache() / "apt" / "+".join((*suites, *other))
        for name in ("lists/partial", "cache/archives/partial"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        conf = self.directory / "apt.conf"
        conf.write_text(APT_CONF.format(directory=self.directory, architecture=architecture.name))
        self.get = need("apt-get", "apt")
        self.private = ["-c", str(conf)]
        settings = [f"Dir::Etc::sourcelist={self.directory}/sources.list"]
        settings += [f"{name}=/dev/null" for name in NOT_THE_MACHINES]
        self.suites_only = self.private + [word for setting in settings for word in ("-o", setting)]

    def uris(self) -> dict[str, str]:
        """Return label -> URI of the Debian archives that the machine uses.

        Raises:
            Failure: There is none.
        """
        ask = ["indextargets", "--format", "$(REPO_URI)|$(ORIGIN)|$(LABEL)", "Created-By: Packages"]
        uris = archives(output([self.get, *ask]))
        if "Debian" not in uris:
            # Whose archive a URI is stands in the lists, and a machine that never updated has none.
            with contextlib.suppress(Failure):
                output([self.get, *self.private, "update"])
            uris = archives(output([self.get, *self.private, *ask]))
        if "Debian" not in uris:
            raise Failure("lab: apt has no Debian archive on this machine", "see sources.list(5)")
        return uris

    def update(self) -> None:
        """Get the package lists of the suites, signatures checked.

        Raises:
            Failure: apt could not, or a signature is bad.
        """
        if not KEYRING.exists():
            raise Failure(f"lab: there is no {KEYRING}", "run `apt-get install debian-archive-keyring`")
        (self.directory / "sources.list").write_text(sources(self.uris(), self.suites, self.architecture))
        output([self.get, *self.suites_only, "update"])

    def names(self) -> list[str]:
        """Return the names of the kernel packages in the lists."""
        search = ["search", "--names-only", "^linux-(image|binary|modules)-[0-9]"]
        rows = output([need("apt-cache", "apt"), *self.suites_only, *search]).splitlines()
        return [row.split()[0] for row in rows]

    def download(self, packages: Sequence[str], directory: Path, what: str) -> None:
        """Download PACKAGES into DIRECTORY and show progress.

        Raises:
            Failure: apt could not.
        """
        self.watch([self.get, *self.suites_only, "-q", "download", *packages], directory, what)

    def download_modules(self, directory: Path, what: str) -> None:
        """Download what belongs to the linux-binary-* in DIRECTORY from the pool of the archive, and show progress.

        A new kernel in a suite takes the linux-modules-* before it out of the lists, which are signed. It leaves
        their file in the pool, and in the lists linux-binary-*: another source package has it. So nothing vouches for
        the file but the modules' own signatures. The kernel that apt has checked has their key, and the lab has it
        ask for them.

        Raises:
            Failure: apt could not.
        """
        (binary,) = directory.glob("linux-binary-*.deb")
        name = binary.name.replace("binary", "modules", 1)
        uri = f"{self.uris()['Debian']}pool/main/l/linux/{name}"
        self.watch(["/usr/lib/apt/apt-helper", *self.suites_only, "download-file", uri, name], directory, what)

    def closure(self, packages: Sequence[str], what: str) -> list[Path]:
        """Fetch PACKAGES with all that they depend on, and show progress; return the files.

        Raises:
            Failure: apt could not.
        """
        # As if nothing were installed. apt locks the directory of that file.
        status = self.directory / "dpkg/status"
        status.parent.mkdir(exist_ok=True)
        status.touch()
        alone = [self.get, *self.suites_only, "-o", f"Dir::State::status={status}", "-o", "APT::Install-Recommends=0"]
        output([*alone, "autoclean"])  # what was fetched when the archive had older versions
        self.watch([*alone, "-qy", "--download-only", "install", *packages], self.directory, what)
        return sorted((self.directory / "cache/archives").glob("*.deb"))

    def watch(self, command: Sequence[str], directory: Path, what: str) -> None:
        """Run a COMMAND of apt in DIRECTORY and show its progress.

        Raises:
            Failure: It failed.
        """
        argv = [*command, "-o", "APT::Status-Fd=1"]
        with (
            (directory / "stderr").open("w+b") as stderr,
            progress(f"fetching {what}") as show,
            process_group(argv, cwd=directory, stdout=subprocess.PIPE, stderr=stderr) as apt,
        ):
            assert apt.stdout
            for row in apt.stdout:
                if row.startswith(b"dlstatus:"):
                    show(float(row.split(b":")[2]))
            if apt.wait():
                stderr.seek(0)
                raise Failure(f"lab: {what} could not be fetched: {reason(stderr.read())}")


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """Give a function that shows how many percent of WHAT are done: a bar on a terminal, else one line."""
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield lambda percent: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=100)
        yield lambda percent: bar.update(task, completed=percent)
