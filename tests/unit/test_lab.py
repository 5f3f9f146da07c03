"""The lab, as far as it goes without a VM, root or the network."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffdguard import cli
from uffdguard.errors import Failure
from uffdguard.lab import kernels, processes, roots, virtiofs, vm
from uffdguard.lab.architectures import ARCHITECTURES, ARM64
from uffdguard.lab.processes import output, process_group, reason

if TYPE_CHECKING:
    from collections.abc import Sequence

OFFERED = [
    "linux-image-6.1.0-9-amd64",
    "linux-image-6.1.0-50-amd64",
    "linux-image-6.1.0-50-amd64-unsigned",
    "linux-image-6.1.0-51-cloud-amd64",
    "linux-image-6.1.0-51-rt-amd64",
    "linux-image-6.12-amd64",
    "linux-image-6.12.90+deb12-amd64",
    "linux-image-6.12.90+deb12.1-amd64",
    "linux-image-6.12.95+deb12-amd64-dbg",
    "linux-image-6.19.14+deb13-amd64",
    "linux-binary-6.19.14+deb13-amd64",
    "linux-binary-7.2.12+deb13-amd64",
    "linux-binary-7.3.4+deb13-amd64",
    "linux-image-7.3.4+deb13-amd64",
    "linux-modules-7.3.5+deb13-amd64",
    "linux-binary-7.3.5+deb13-rt-amd64",
    "linux-image-6.12.89+deb12-cloud-amd64",
    "linux-image-6.12.91+deb12-cloud-amd64-unsigned",
    "linux-image-6.12.91+deb12-rt-amd64",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have an empty cache and no apt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "need", lambda tool, package: "/bin/false")
    return tmp_path / "uffdguard"


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["lab", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize(
    ("word", "release", "packages"),
    [
        ("6.1", "6.1.0-50-amd64", ["linux-image-6.1.0-50-amd64"]),
        ("oldest", "6.1.0-50-amd64", ["linux-image-6.1.0-50-amd64"]),
        ("6.12", "6.12.90+deb12.1-amd64", ["linux-image-6.12.90+deb12.1-amd64"]),
        (
            "7.2",
            "7.2.12+deb13-amd64",
            ["linux-binary-7.2.12+deb13-amd64", "linux-modules-7.2.12+deb13-amd64"],
        ),
        (
            "newest",
            "7.3.4+deb13-amd64",
            ["linux-binary-7.3.4+deb13-amd64", "linux-modules-7.3.4+deb13-amd64"],
        ),
        ("6.12-rt", "6.12.91+deb12-rt-amd64", ["linux-image-6.12.91+deb12-rt-amd64"]),
        ("6.12-cloud", "6.12.89+deb12-cloud-amd64", ["linux-image-6.12.89+deb12-cloud-amd64"]),
        *(
            (
                word,
                "7.3.5+deb13-rt-amd64",
                ["linux-binary-7.3.5+deb13-rt-amd64", "linux-modules-7.3.5+deb13-rt-amd64"],
            )
            for word in ("7.3-rt", "7.x-rt")
        ),
    ],
)
def test_the_highest_kernel_of_a_line_and_a_flavour_is_chosen(word: str, release: str, packages: list[str]) -> None:
    assert kernels.choose(OFFERED, kernels.find_line(word)) == (release, packages)


def test_each_architecture_has_its_own_kernels(cache: Path) -> None:
    offered = [*OFFERED, "linux-image-6.12.95+deb13-arm64", "linux-image-6.12.96+deb13-arm64-16k"]
    line = kernels.find_line("oldest", ARM64)
    assert line.name == "6.12"
    assert kernels.choose(offered, line, ARM64) == ("6.12.95+deb13-arm64", ["linux-image-6.12.95+deb13-arm64"])
    assert kernels.choose(offered, line)[0] == "6.12.90+deb12.1-amd64"
    for release in ("6.12.90+deb12-amd64", "6.12.95+deb13-arm64"):
        (cache / "kernels/6.12" / release).mkdir(parents=True)
    for architecture in ARCHITECTURES.values():
        kernel = kernels.cached(line, architecture)
        assert kernel
        assert kernel.architecture == architecture
    assert "arch=arm64" in kernels.sources({"Debian": "https://one.example/debian/"}, ["trixie"], ARM64)


def test_a_disk_has_our_directories_at_their_places(tmp_path: Path) -> None:
    project, environment, other = tmp_path / "project", tmp_path / "project/.venv", tmp_path / "a, b"
    places = vm.outermost([project, environment, other])
    assert places == [project, other]
    shared = " ".join(vm.exports(places))
    mounted = vm.script(["true"], project, [], [], places, architecture=ARM64)
    for number, path in enumerate(places):
        assert f"local,id=lab{number},path={str(path).replace(',', ',,')},security_model=none,readonly=on" in shared
        assert f" lab{number} {shlex.quote(str(path))} ||" in mounted
    subprocess.run(["sh", "-n"], input=mounted, text=True, check=True)
    assert " 9p " not in vm.script(["true"], project, [])


def test_qemu_is_asked_for_before_a_disk_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "get", lambda word, architecture: kernels.Kernel("6.12.95+deb13-arm64", tmp_path))
    monkeypatch.setattr(processes, "PATH", "")
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    assert run_cli(capsys, "--arch", "arm64", "--", "true") == (
        1,
        "",
        "uffdguard: lab: qemu-system-aarch64 is not installed; run `apt-get install qemu-system-arm`\n",
    )


def test_a_disk_that_cannot_be_made_is_told_on_one_line_and_nothing_is_left_of_it(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "get", lambda word, architecture: kernels.Kernel("6.12.95+deb13-arm64", tmp_path))
    for module in (vm, roots):
        monkeypatch.setattr(module, "need", lambda tool, package: tool)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    status, out, err = run_cli(capsys, "--arch", "arm64", "--", "true")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("uffdguard: lab: ")
    assert list((cache / "disks").iterdir()) == []


def test_a_line_that_the_archive_does_not_have_is_told_with_its_suites() -> None:
    with pytest.raises(Failure, match=r"no Linux 6\.18 in trixie-backports"):
        kernels.choose(OFFERED, kernels.find_line("6.18"))


@pytest.mark.parametrize(
    "word", ["5.15", "6", "6.13", "7", "7.3.4", "7x3", "", "../7.3", "6.1-rt", "6.13-cloud", "7.3-lowlatency"]
)
def test_a_line_that_there_is_not_is_refused(word: str) -> None:
    with pytest.raises(Failure, match="no kernel line"):
        kernels.find_line(word)


def test_the_archives_are_told_by_who_signed_for_them() -> None:
    targets = (
        "cdrom:[Debian]/|Debian|Debian\n"
        "https://other.example/linux/debian/|Other|Debian\n"
        "https://one.example/debian/|Debian|Debian\n"
        "https://one.example/debian-security/|Debian|Debian-Security\n"
        "https://two.example/debian/|Debian|Debian\n"
    )
    assert kernels.archives(targets) == {
        "Debian": "https://one.example/debian/",
        "Debian-Security": "https://one.example/debian-security/",
    }
    assert kernels.archives("") == {}


def test_each_suite_comes_from_its_archive_and_must_be_signed() -> None:
    uris = {"Debian": "https://one.example/debian/", "Debian-Security": "https://one.example/security/"}
    first, second = kernels.sources(uris, kernels.oldest().suites).splitlines()
    assert first.endswith("https://one.example/debian/ bookworm main")
    assert second.endswith("https://one.example/security/ bookworm-security main")
    assert f"signed-by={kernels.KEYRING}" in first
    assert "trusted" not in first + second


def test_a_machine_without_a_security_archive_does_without() -> None:
    rows = kernels.sources({"Debian": "https://one.example/debian/"}, kernels.oldest().suites).splitlines()
    assert [row.split()[-2] for row in rows] == ["bookworm"]


def test_a_cached_kernel_is_used_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    releases = ("7.3.4+deb13-amd64", "7.10.1+deb13-amd64", "7.3.10+deb13-amd64", "7.11.1+deb13-rt-amd64")
    for release in releases:
        (cache / "kernels" / kernels.line_name(release) / release).mkdir(parents=True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert kernels.get("7.3").release == "7.3.10+deb13-amd64"
    assert kernels.get("newest").release == "7.10.1+deb13-amd64"
    assert kernels.get("7.x-rt").release == "7.11.1+deb13-rt-amd64"


def test_a_cached_kernel_of_a_line_with_a_number_is_not_taken_for_the_newest(cache: Path) -> None:
    (cache / "kernels/7.0/7.0.13+deb13-amd64").mkdir(parents=True)
    assert kernels.cached(kernels.find_line("newest")) is None


@pytest.mark.parametrize(
    ("listed", "steps"), [(True, ["download binary modules"]), (False, ["download binary", "modules"])]
)
def test_modules_that_are_in_the_lists_no_more_are_fetched_from_the_pool(
    listed: bool, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    names = [name for name in OFFERED if "7.2" in name] + ["linux-modules-7.2.12+deb13-amd64"] * listed

    def download(apt: kernels.Apt, packages: Sequence[str], directory: Path, what: str) -> None:
        taken.append(" ".join(["download", *(package.split("-")[1] for package in packages)]))

    monkeypatch.setattr(kernels, "output", lambda argv: "")
    monkeypatch.setattr(kernels.Apt, "update", lambda apt: None)
    monkeypatch.setattr(kernels.Apt, "names", lambda apt: names)
    monkeypatch.setattr(kernels.Apt, "download", download)
    monkeypatch.setattr(kernels.Apt, "download_modules", lambda apt, directory, what: taken.append("modules"))
    assert kernels.fetch(kernels.find_line("7.2")).release == "7.2.12+deb13-amd64"
    assert taken == steps


def test_of_a_package_of_modules_only_modules_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may vouch for it: it must not bring the kernel that would check its modules."""
    monkeypatch.setattr(kernels, "need", lambda tool, package: tool)
    release = "7.0.13+deb13-amd64"
    package, modules = tmp_path / "package", tmp_path / "package/usr/lib/modules" / release
    (modules / "kernel/fs").mkdir(parents=True)
    for path in ("kernel/fs/9p.ko.xz", "modules.order", "vmlinuz", "kernel/fs/notes"):
        (modules / path).write_text(path)
    (modules / "kernel/away.ko").symlink_to("/etc/passwd")
    (package / "boot").mkdir()
    (package / f"boot/vmlinuz-{release}").write_text("another kernel")
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n".replace("x", "y")
    )
    archive = tmp_path / "linux-modules-x.deb"
    subprocess.run(["dpkg-deb", "--build", package, archive], check=True, stdout=subprocess.DEVNULL)
    kernels.unpack(archive, tmp_path / "root", release)
    below = tmp_path / "root/usr/lib/modules" / release
    assert {path for path in (tmp_path / "root").rglob("*") if not path.is_dir()} == {
        below / "kernel/fs/9p.ko.xz",
        below / "modules.order",
    }


def test_another_machine_than_x86_64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(Failure, match="must be x86-64"):
        kernels.get("6.12")


def test_the_lines_are_listed_with_what_is_cached(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "kernels/6.12/6.12.90+deb12-amd64").mkdir(parents=True)
    (cache / "kernels/7.3/7.3.4+deb13-amd64").mkdir(parents=True)
    status, out, err = run_cli(capsys, "kernels", "--json")
    assert (status, err) == (0, "")
    rows = {row.pop("line"): row for row in json.loads(out)}
    names = [*(line.name for line in kernels.LINES[:-1]), "7.3", *(line.name for line in kernels.FLAVOURS)]
    assert list(rows) == names
    assert rows["5.10"] == {"supported": False, "cached": None}
    assert rows["6.12"] == {"supported": True, "cached": "6.12.90+deb12-amd64"}
    assert rows["7.3"] == {"supported": True, "cached": "7.3.4+deb13-amd64"}
    first, second, *_ = run_cli(capsys, "kernels")[1].splitlines()
    assert first.split(maxsplit=2) == ["5.10", "refused", "not cached"]
    assert second.split(maxsplit=2) == ["6.1", "supported", "not cached"]


def test_the_newest_line_has_no_number_while_nothing_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_cli(capsys, "kernels")[1].splitlines()
    assert [row.split()[0] for row in rows if row.startswith("7.x")] == ["7.x", "7.x-rt", "7.x-cloud"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "-l"], "COMMAND goes after --"),
        ([], "a shell needs a terminal"),
        (["--"], "a shell needs a terminal"),
        (["--cpus", "2", "--count-instructions", "--", "true"], "takes one CPU"),
        (["--cpus", "0", "--", "true"], "--cpus"),
        (["--memory", "1T", "--", "true"], "no SIZE"),
        (["--timeout", "0", "--", "true"], "--timeout"),
        (["--timeout", "nan", "--", "true"], "--timeout"),
        (["kernels", "--", "ls"], "takes no COMMAND"),
    ],
)
def test_wrong_usage_is_told_on_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    status, out, err = run_cli(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_what_stands_after_two_dashes_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Sequence[str], int]] = []

    def run(kernel: object, command: Sequence[str], *, cpus: int, **options: object) -> int:
        seen.append((command, cpus))
        return 7

    monkeypatch.setattr(vm, "run", run)
    monkeypatch.setattr(kernels, "get", lambda word, architecture: word)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    assert run_cli(capsys, "--", "kernels", "--json")[0] == 7
    assert run_cli(capsys, "--kernel", "6.1", "--count-instructions", "--", "a", "--", "--cpus")[0] == 7
    assert seen == [(("kernels", "--json"), 2), (("a", "--", "--cpus"), 1)]


def test_the_command_reaches_the_guest_as_it_is(tmp_path: Path) -> None:
    command = ["printf", "[%s]", "a b", "it's", "$HOME", "", "new\nline", "*", "--", "{x}", "\udcff"]
    text = vm.script(command, tmp_path, [])
    line = text[text.index("env -i") : text.index(" </dev/null")]
    done = subprocess.run(["sh", "-c", line.encode(errors="surrogateescape")], capture_output=True)
    assert done.stdout == b"[a b][it's][$HOME][][new\nline][*][--][{x}][\xff]"


def test_the_script_is_one_that_a_shell_can_read(tmp_path: Path) -> None:
    for command in (["true"], []):
        text = vm.script(command, tmp_path / "it's here", [tmp_path / "a b"])
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


def test_directories_that_others_cannot_enter_are_found_outer_first(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    inner = tmp_path / "home/user/project"
    inner.mkdir(parents=True)
    (tmp_path / "home/user").chmod(0o700)
    inner.chmod(0o750)
    (tmp_path / "link").symlink_to(inner)
    below = [path for path in vm.closed_directories([tmp_path / "link"]) if path.is_relative_to(tmp_path)]
    assert below == [tmp_path / "home/user", inner]


def test_only_the_outermost_closed_directory_is_overlaid() -> None:
    closed = [Path("/home/user"), Path("/root"), Path("/root/.local"), Path("/rooted")]
    assert vm.overlays(closed) == [*vm.OVERLAID, "/root", "/rooted"]


def test_the_exit_status_counts_once_all_of_it_is_there(tmp_path: Path) -> None:
    assert vm.exit_status(tmp_path) is None
    for text, status in (("", None), ("1", None), ("12\n", 12), ("0\n", 0)):
        (tmp_path / "status").write_text(text)
        assert vm.exit_status(tmp_path) == status


def test_a_kernel_bug_is_shown_without_what_would_change_the_terminal(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "log").write_bytes(b"before\r\n\x1bc[1.0] BUG: here\r\nafter\r\n")
    assert vm.report(tmp_path, over=False, status=0)
    assert capfdbinary.readouterr().err.startswith(b"^[c[1.0] BUG: here\nafter\n")
    (tmp_path / "log").write_bytes(b"debug: fine\n")
    assert not vm.report(tmp_path, over=False, status=1)


def test_a_vm_that_ended_early_is_told_of_by_its_first_trouble_and_its_last_lines(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "log").write_text("boot\n" * 99 + "Kernel panic\n" + "stack\n" * 99 + "the end\n")
    assert vm.report(tmp_path, over=False, status=None)
    told = capfdbinary.readouterr().err
    assert told.startswith(b"Kernel panic\nstack\n")
    assert told.endswith(b"stack\nthe end\n")
    assert told.count(b"\n") == 2 * vm.TAIL
    (tmp_path / "log").write_text("fine\n" * 99)
    assert vm.report(tmp_path, over=True, status=None)
    assert capfdbinary.readouterr().err == b"fine\n" * vm.TAIL


def test_a_tool_that_fails_is_told_in_its_own_words() -> None:
    assert output(["echo", "fine"]) == "fine\n"
    with pytest.raises(Failure, match="sh failed: the first"):
        output(["sh", "-c", "echo W: warning >&2; echo E: the first >&2; echo E: more >&2; exit 100"])
    assert reason(b"") == "it does not say why"


def test_nothing_of_a_process_group_is_left() -> None:
    script = "(trap '' TERM INT; sleep 60 & echo $!; wait) & wait"
    with process_group(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
    assert not Path(f"/proc/{child}").exists()


def test_virtiofsd_is_this_machines_or_fetched_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, ...]] = []
    monkeypatch.setattr(virtiofs, "need", lambda tool, package: tool)
    monkeypatch.setattr(virtiofs, "output", lambda argv: "")
    monkeypatch.setattr(kernels.Apt, "update", lambda apt: None)
    monkeypatch.setattr(kernels.Apt, "download", lambda apt, packages, directory, what: fetched.append(packages))
    monkeypatch.setattr(virtiofs, "PLACES", f"{tmp_path}/libexec")
    for _ in range(2):
        assert virtiofs.directory() == cache / "roots/virtiofsd/bin"
    assert fetched == [virtiofs.PACKAGES]
    assert (cache / "roots/virtiofsd/bin/virtiofsd").stat().st_mode & 0o111
    ours = tmp_path / "libexec/virtiofsd"
    ours.parent.mkdir()
    ours.touch(0o755)
    assert virtiofs.directory() == ours.parent


def test_a_kernel_without_9p_has_its_files_by_virtiofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "need", lambda tool, package: tool)
    for flavour, expected in (("", True), ("-rt", True), ("-cloud", False)):
        kernel = kernels.Kernel(f"6.12.95+deb13{flavour}-amd64", tmp_path)
        assert ("--force-9p" in vm.virtme(kernel, tmp_path, [], terminal=False)) == expected


def test_what_the_guest_may_cover_in_var_is_uncovered_inner_first() -> None:
    clone = Path("/var/tmp/none/clone")
    assert vm.covered_directories([Path("/srv/none"), clone]) == [clone, Path("/var/tmp/none"), Path("/var/tmp")]
    text = vm.script(["true"], clone, covered=vm.covered_directories([clone]))
    assert text.index("umount /var/tmp/none/clone ") < text.index("cd /var/tmp/none/clone ")
    assert "umount" not in vm.script(["true"], Path("/srv/none"))


@pytest.mark.parametrize("path", ["/run/user/1000/clone", "/dev/shm/clone"])
def test_what_the_guest_cannot_see_is_refused_with_where_to_have_it(path: str) -> None:
    with pytest.raises(Failure, match=f"^lab: {path} cannot be seen in the VM, .*; have the project") as error:
        vm.covered_directories([Path("/srv"), Path(path)])
    assert str(error.value).count("\n") == 0
