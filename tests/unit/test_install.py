"""What install puts in place and uninstall takes away, below a directory of the test's own."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inside import Killer, forked, watched

from uffdguard import config, install
from uffdguard.cli.group import cli
from uffdguard.cli.install import completion
from uffdguard.errors import Failure
from uffdguard.kernel import features, native
from uffdguard.policy import Mode, Policy
from uffdguard.steps import beside

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = Path("/opt/uffdguard/bin/uffdguard")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MANIFEST", "UNITS", "PAGES", "COMPLETION"):
        path: Path = getattr(install, name)
        monkeypatch.setattr(install, name, tmp_path / path.relative_to("/"))
    monkeypatch.setattr(config, "DEFAULT", tmp_path / "usr/lib/uffdguard.toml")
    monkeypatch.setattr(config, "ADMINISTRATOR", tmp_path / "etc/uffdguard.toml")
    monkeypatch.setattr(config, "DROP_INS", tmp_path / "etc/uffdguard.d")
    monkeypatch.setattr(install, "_systemctl", lambda *words: None)
    for name in ("GRUB", "GRUB_FILE"):
        monkeypatch.setattr(install, name, tmp_path / getattr(install, name).relative_to("/"))
    monkeypatch.setattr(features, "GRUB_DROP_INS", install.GRUB_FILE.parent)
    monkeypatch.setattr(native, "need_root", lambda what: None)
    monkeypatch.setattr(native, "has_kvm", lambda: True)
    monkeypatch.setattr(features, "hook", lambda: features.Row("hook", "ok", ""))
    return tmp_path


class Grub:
    """A boot loader whose configuration is shell, as Debian's is."""

    def __init__(self, outside: Path) -> None:
        self.lsms, self.command_line = outside / "lsm", outside / "command-line"
        self.lsms.write_text("lockdown,capability,landlock,yama,apparmor\n")
        install.GRUB_FILE.parent.mkdir(parents=True)
        install.GRUB.write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="a=b"\n#lsm=bpf\n')
        self.program = outside / "update-grub"
        self.program.write_text(
            f"#!/bin/sh -e\nfor file in {install.GRUB} {install.GRUB_FILE.parent}/*.cfg; do\n"
            f'if [ -e "$file" ]; then . "$file"; fi\ndone\n'
            f'echo "$GRUB_CMDLINE_LINUX $GRUB_CMDLINE_LINUX_DEFAULT" >{self.command_line}\n'
        )
        self.program.chmod(0o755)


@pytest.fixture
def grub(root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Grub:
    outside = tmp_path_factory.mktemp("grub")
    monkeypatch.setattr(features, "SECURITYFS", outside)
    monkeypatch.setenv("PATH", str(outside), prepend=":")
    return Grub(outside)


def written(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text(errors="backslashreplace")
        for path in root.rglob("*")
        if path.is_file()
    }


def test_everything_is_put_in_place_and_taken_away(root: Path) -> None:
    install.install(COMMAND, Mode.KVM, completion())
    files = written(root)
    assert set(files) == {
        "etc/systemd/system/uffdguard-fallback.service",
        "etc/systemd/system/uffdguard-knob.service",
        "etc/systemd/system/uffdguard-log.service",
        "etc/systemd/system/uffdguard-uncover.service",
        "etc/systemd/system/uffdguard.service",
        "usr/lib/uffdguard.toml",
        "usr/local/share/bash-completion/completions/uffdguard",
        "usr/local/share/man/man5/uffdguard.toml.5",
        "usr/local/share/man/man7/unprivileged_userfaultfd.7",
        "usr/local/share/man/man8/uffdguard.8",
        "var/lib/uffdguard/installed.json",
    }
    for name in install.ENABLED:
        unit = files[f"etc/systemd/system/{name}"]
        assert f"={COMMAND} " in unit
        assert "/usr/bin/" not in unit
    assert config.load().policy == Policy(Mode.KVM)
    assert install.uninstall() == []
    assert written(root) == {}


def test_nothing_is_put_in_place_on_a_kernel_without_the_hook(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "hook", lambda: features.Row("hook", "missing", "no hook", "boot another"))
    with pytest.raises(Failure, match="hook: no hook; boot another"):
        install.install(COMMAND, Mode.KVM, completion())
    assert written(root) == {}


def test_the_backend_native_needs_no_hook(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "hook", lambda: features.Row("hook", "missing", "no hook", "boot another"))
    config.ADMINISTRATOR.parent.mkdir(exist_ok=True)
    config.ADMINISTRATOR.write_text('backend = "native"\n')
    assert install.install(COMMAND, Mode.KVM, completion()).at_boot is Mode.KVM
    install.uninstall()
    assert list(written(root)) == ["etc/uffdguard.toml"]


def test_it_can_be_repeated_with_another_mode(root: Path) -> None:
    install.install(COMMAND, Mode.KVM, completion())
    install.install(COMMAND, Mode.ENABLED, completion())
    assert config.load().policy == Policy(Mode.ENABLED)
    install.uninstall()
    assert written(root) == {}


def test_the_mode_is_kept_unless_another_is_named_and_a_change_is_reported(root: Path) -> None:
    def install_(mode: Mode | None) -> install.Installed:
        return install.install(COMMAND, mode, completion())

    assert install_(None) == (Mode.DISABLED, None, Mode.DISABLED)
    assert install_(Mode.KVM) == (Mode.KVM, Mode.DISABLED, Mode.KVM)
    assert install_(None) == (Mode.KVM, Mode.KVM, Mode.KVM)
    config.ADMINISTRATOR.parent.mkdir(exist_ok=True)
    config.ADMINISTRATOR.write_text('mode = "enabled"\n')
    assert install_(None) == (Mode.KVM, Mode.KVM, Mode.ENABLED)


def test_the_command_prints_the_mode_and_its_change(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str) -> list[str]:
        cli.main(["install", *words], standalone_mode=False)
        return capsys.readouterr().out.replace(str(config.DEFAULT), "DEFAULT").splitlines()

    def at_once(mode: str) -> str:
        return f"in force in mode {mode} from the next boot on; at once: systemctl start uffdguard"

    assert printed() == ["mode disabled in DEFAULT", at_once("disabled")]
    assert printed("--mode", "kvm") == ["mode kvm in DEFAULT; it was disabled", at_once("kvm")]
    assert printed() == ["mode kvm in DEFAULT, as before", at_once("kvm")]
    config.ADMINISTRATOR.parent.mkdir(exist_ok=True)
    config.ADMINISTRATOR.write_text('mode = "enabled"\n')
    assert printed() == [
        "mode kvm in DEFAULT, as before",
        f"but {config.ADMINISTRATOR} or {config.DROP_INS} says enabled, and wins",
        at_once("enabled"),
    ]


def test_a_configuration_with_which_no_boot_could_start_is_refused(root: Path) -> None:
    config.ADMINISTRATOR.parent.mkdir(exist_ok=True)
    config.ADMINISTRATOR.write_text('mode = "kwm"\n')
    with pytest.raises(Failure, match=r"uffdguard\.toml, line 1: mode: must be one of"):
        install.install(COMMAND, None, completion())
    assert list(written(root)) == ["etc/uffdguard.toml"]


def test_a_file_of_somebody_else_is_not_written_over(root: Path) -> None:
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/uffdguard.toml").write_bytes(b'mode = "enabled" # \xe4\n')
    with pytest.raises(Failure, match=r"not put there by us, or changed since: .*uffdguard\.toml; move it away"):
        install.install(COMMAND, Mode.KVM, completion())
    assert written(root) == {"usr/lib/uffdguard.toml": 'mode = "enabled" # \\xe4\n'}


def test_a_file_that_was_changed_is_left_and_named(root: Path) -> None:
    install.install(COMMAND, Mode.KVM, completion())
    config.DEFAULT.write_text('mode = "disabled"\n')
    assert install.uninstall() == [str(config.DEFAULT)]
    assert list(written(root)) == ["usr/lib/uffdguard.toml"]


def killed_at(number: int, job: Callable[[], object]) -> bool:
    """Do JOB in a process that is killed before its step of this NUMBER; tell whether it came to that."""

    def doomed() -> None:
        with watched(Killer(number)):
            job()

    status = os.waitstatus_to_exitcode(os.waitpid(forked(doomed), 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def fresh() -> None:
    install.install(COMMAND, Mode.KVM, completion())


def again() -> None:
    install.install(COMMAND, Mode.ENABLED, completion())


class TestTheLsm:
    """install --lsm adds bpf to the LSMs that the next boot has, and uninstall takes it away."""

    def test_is_added_behind_those_that_are_there_and_taken_away(self, root: Path, grub: Grub) -> None:
        before = written(root)
        assert install.add_lsm() == "lsm=lockdown,landlock,yama,apparmor,bpf"
        assert grub.command_line.read_text() == "a=b lsm=lockdown,landlock,yama,apparmor,bpf quiet\n"
        assert set(written(root)) - set(before) == {
            "etc/default/grub.d/uffdguard.cfg",
            "var/lib/uffdguard/installed.json",
        }
        assert install.add_lsm()  # again, after an update-grub that was killed, say
        assert install.uninstall() == []
        assert written(root) == before
        assert grub.command_line.read_text() == "a=b quiet\n"

    def test_is_taken_away_with_all_that_install_puts_in_place(self, root: Path, grub: Grub) -> None:
        before = written(root)
        install.add_lsm()
        fresh()
        again()
        assert "lsm=" in grub.command_line.read_text()
        assert install.uninstall() == []
        assert written(root) == before
        assert grub.command_line.read_text() == "a=b quiet\n"

    def test_alone_leaves_the_units_of_a_package_alone(self, grub: Grub, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[tuple[str, ...]] = []
        monkeypatch.setattr(install, "_systemctl", lambda *words: called.append(words))
        install.add_lsm()
        install.uninstall()
        assert called == [("daemon-reload",)]

    def test_is_printed_with_how_it_goes_away(self, grub: Grub, capsys: pytest.CaptureFixture[str]) -> None:
        cli.main(["install", "--lsm"], standalone_mode=False)
        assert capsys.readouterr().out.splitlines() == [
            f"lsm=lockdown,landlock,yama,apparmor,bpf in {install.GRUB_FILE}, and update-grub was run:"
            " so it is from the next boot on",
            "uffdguard uninstall takes it away again",
        ]
        grub.lsms.write_text("lockdown,capability,bpf\n")
        cli.main(["install", "--lsm"], standalone_mode=False)
        assert capsys.readouterr().out == "bpf is among the LSMs already; nothing to do\n"

    def test_is_for_the_hand_where_grub_has_no_drop_ins(self, root: Path, grub: Grub) -> None:
        install.GRUB_FILE.parent.rmdir()
        before = written(root)
        with pytest.raises(
            Failure, match=r"grub\.d is not there.*; add lsm=lockdown,.*,bpf to the kernel's command line"
        ):
            install.add_lsm()
        assert written(root) == before

    @pytest.mark.parametrize("place", ["grub", "grub.d/cloud.cfg"])
    def test_is_for_the_hand_where_another_file_sets_it(self, root: Path, grub: Grub, place: str) -> None:
        other = root / "etc/default" / place
        other.write_text('GRUB_CMDLINE_LINUX_DEFAULT="quiet lsm=yama"\n')
        before = written(root)
        with pytest.raises(Failure, match=f"{other} sets lsm= already; add ,bpf to that by hand"):
            install.add_lsm()
        assert written(root) == before

    def test_that_update_grub_does_not_take_is_reported_and_can_be_repeated_or_taken_away(
        self, root: Path, grub: Grub
    ) -> None:
        before = written(root)
        right = grub.program.read_text()
        grub.program.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
        with pytest.raises(Failure, match="update-grub failed: no room"):
            install.add_lsm()
        grub.program.write_text(right)
        assert install.add_lsm()
        assert install.uninstall() == []
        assert written(root) == before

    def test_a_file_of_somebody_else_is_not_written_over(self, grub: Grub) -> None:
        install.GRUB_FILE.write_text("# mine\n")
        with pytest.raises(Failure, match="not put there by us"):
            install.add_lsm()
        assert install.GRUB_FILE.read_text() == "# mine\n"

    def test_doctor_says_how(self, grub: Grub) -> None:
        row = features._lsm()
        assert row.state == "missing"
        assert row.hint.startswith(
            "boot with lsm=lockdown,landlock,yama,apparmor,bpf, which uffdguard install --lsm has GRUB do; "
        )
        install.GRUB_FILE.parent.rmdir()
        assert features._lsm().hint.startswith("boot with lsm=lockdown,landlock,yama,apparmor,bpf; ")


def test_the_steps_are_those_that_are_taken(root: Path, grub: Grub) -> None:
    """So that the test below, which kills at each, leaves none out."""
    with watched(Killer()) as seen:
        fresh()
        install.add_lsm()
        install.uninstall()
    assert tuple(dict.fromkeys(seen)) == install.STEPS


@pytest.mark.parametrize("mended_by", [again, install.uninstall])
@pytest.mark.parametrize(("before", "job"), [(None, fresh), (fresh, again), (fresh, install.uninstall)])
def test_a_kill_at_any_step_is_mended_by_install_and_by_uninstall(
    root: Path, before: Callable[[], None] | None, job: Callable[[], object], mended_by: Callable[[], object]
) -> None:
    for number in itertools.count():
        if before:
            before()
        killed = killed_at(number, job)
        if job is again:  # so that the next boot finds them
            assert all((install.UNITS / name).exists() for name in install.NAMES)
        with contextlib.suppress(Failure):  # there was nothing to uninstall
            mended_by()
        if mended_by is again:
            assert config.load().policy == Policy(Mode.ENABLED)
            assert len(written(root)) == 11
            assert install.uninstall() == []
        assert written(root) == {}
        if not killed:
            break
    assert number >= len(install.NAMES) + 4


def test_what_a_kill_has_left_of_a_file_is_taken_away(root: Path) -> None:
    fresh()
    for path in (install.UNITS / install.NAMES[0], config.DEFAULT):
        beside(path).write_text("half of")
    assert install.uninstall() == []
    assert written(root) == {}


@pytest.mark.parametrize(
    "content", [b'{"/etc', b'{"/etc": 1}', b"[]", b"[" * 2000, b"\xff", b'{"": []}', b'{"/": []}', b'{"/a\\u0000": []}']
)
def test_a_list_that_cannot_be_read_is_told(root: Path, content: bytes) -> None:
    install.MANIFEST.parent.mkdir(parents=True)
    install.MANIFEST.write_bytes(content)
    for job in (install.uninstall, lambda: install.install(COMMAND, Mode.KVM, "")):
        with pytest.raises(Failure, match=r"installed\.json cannot be read"):
            job()
    assert list(written(root)) == ["var/lib/uffdguard/installed.json"]


def test_there_is_nothing_to_uninstall_where_nothing_was_installed() -> None:
    with pytest.raises(Failure, match="nothing was put in place"):
        install.uninstall()


class TestFallback:
    """What the unit that a failed start leads to does, run by sh with files of the test in the place of the kernel's.

    In a real boot: tests/boot.
    """

    @pytest.fixture
    def run(self, root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
        """Return a function that runs it, or the one that uncovers the native file."""
        for directory in ("sys/kernel", "sys/vm", "bin"):
            (root / directory).mkdir(parents=True)
        umount = root / "bin/umount"
        umount.write_text(f'#!/bin/sh\necho "$@" >>{root}/unmounted\n')
        umount.chmod(0o755)
        (root / "sys/kernel/ftrace_enabled").write_text("1\n")
        (root / "sys/vm/unprivileged_userfaultfd").write_text("1\n")
        (root / "mounts").write_text("uffdguard /proc/sys/vm/unprivileged_userfaultfd fuse.uffdguard rw 0 0\n")
        (root / "hidden/proc").mkdir(parents=True)
        environment = os.environ | {"PATH": f"{root}/bin:{os.environ['PATH']}"}

        def run(name: str = "fallback") -> subprocess.CompletedProcess[str]:
            unit = (install.shared() / f"packaging/systemd/uffdguard-{name}.service").read_text()
            (script,) = re.findall(r"^ExecStart=:/bin/sh -c '(.*?)'$", unit, re.MULTILINE | re.DOTALL)
            script = script.replace("\\\n", " ").replace("/sys/fs/bpf", f"{root}/bpf")
            script = script.replace("/run/uffdguard.proc", f"{root}/hidden").replace("/run/uffdguard/", f"{root}/run/")
            script = re.sub(r"/proc/(sys|mounts)", rf"{root}/\1", script)
            assert not re.search(r"(?<!\w)/proc", script)
            assert "%" not in script.replace("%%", "")  # which systemd takes for its own
            words = ["/bin/sh", "-c", script.replace("%%", "%")]
            return subprocess.run(words, env=environment, capture_output=True, text=True)

        return run

    @pytest.fixture
    def pins(self, root: Path) -> Path:
        """The directory of the pins, as a start has it."""
        if os.geteuid():
            pytest.skip("only root gives a directory away")
        pins = root / "bpf/uffdguard"
        pins.mkdir(parents=True)
        native.make_own(pins)
        return pins

    @pytest.fixture
    def knob(self, root: Path) -> Path:
        return root / "sys/vm/unprivileged_userfaultfd"

    def test_closes_the_knob_and_says_what_to_do(
        self, root: Path, knob: Path, run: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        done = run()
        assert (done.returncode, done.stderr) == (0, "")
        assert knob.read_text() == "0\n"
        assert done.stdout.startswith("<3>uffdguard.service has failed and no policy is in force: ")
        assert "vm.unprivileged_userfaultfd is 0 now (before: 1), " in done.stdout
        assert done.stdout.endswith("correct what it names, and run systemctl restart uffdguard.service.\n")
        assert (root / "unmounted").read_text() == f"-a -l -t fuse.uffdguard\n-l {root}/hidden {root}/hidden/proc\n"
        assert not (root / "hidden").exists()

    @pytest.mark.parametrize("ftrace", ["1\n", None])
    def test_leaves_it_where_an_earlier_policy_is_in_force(
        self,
        root: Path,
        knob: Path,
        pins: Path,
        run: Callable[..., subprocess.CompletedProcess[str]],
        ftrace: str | None,
    ) -> None:
        (pins / "decide").touch()
        if not ftrace:
            (root / "sys/kernel/ftrace_enabled").unlink()
        done = run()
        assert (done.returncode, done.stderr) == (0, "")
        assert knob.read_text() == "1\n"
        assert done.stdout.startswith("<4>uffdguard.service has failed. The policy that was in force before stays ")
        assert not (root / "unmounted").exists()

    @pytest.mark.parametrize(("mode", "value"), [("enabled", "1\n"), ("kvm", "0\n"), ("disabled", "0\n")])
    def test_leaves_what_the_backend_native_has_set(
        self, root: Path, knob: Path, run: Callable[[], subprocess.CompletedProcess[str]], mode: str, value: str
    ) -> None:
        (root / "run").mkdir()
        (root / "run/mode").write_text(mode)
        done = run()
        assert (done.returncode, done.stderr, knob.read_text()) == (0, "", value)
        assert done.stdout.startswith("<4>uffdguard.service has failed. The policy that was in force before stays ")

    @pytest.mark.parametrize(
        ("owner", "mode", "left"), [(0, 0o700, "1\n"), (0, 0o755, "0\n"), (1000, 0o700, "0\n"), (1000, 0o777, "0\n")]
    )
    def test_goes_by_pins_of_root_only(
        self,
        knob: Path,
        pins: Path,
        run: Callable[[], subprocess.CompletedProcess[str]],
        owner: int,
        mode: int,
        left: str,
    ) -> None:
        """As state.foreign_pins() does; one of root's that is closed is of an older version, or of a kill."""
        (pins / "decide").touch()
        os.chown(pins, owner, owner)
        pins.chmod(mode)
        assert run().returncode == 0
        assert knob.read_text() == left

    def test_closes_it_where_ftrace_is_off_and_a_pinned_policy_is_empty(
        self, root: Path, knob: Path, pins: Path, run: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        (pins / "decide").touch()
        (root / "sys/kernel/ftrace_enabled").write_text("0\n")
        assert run().returncode == 0
        assert knob.read_text() == "0\n"

    def test_closes_it_where_a_start_has_left_other_pins_only(
        self, knob: Path, pins: Path, run: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        (pins / "grants").touch()
        assert run().returncode == 0
        assert knob.read_text() == "0\n"

    def test_removes_a_guard_of_sysctls_that_keeps_it_open(
        self, root: Path, knob: Path, run: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        """The kernel's part is played by sleep(1), as which a guard whose pin has gone lets the write pass."""
        guard = root / "bpf/uffdguard/guard_sysctl"
        guard.parent.mkdir(parents=True)
        guard.touch()
        knob.rename(root / "freed")
        knob.mkdir()
        sleep = root / "bin/sleep"
        sleep.write_text(f"#!/bin/sh\n[ -e {guard} ] || {{ rmdir {knob}; mv {root}/freed {knob}; }}\n")
        sleep.chmod(0o755)
        assert run().returncode == 0
        assert knob.read_text() == "0\n"

    def test_has_nothing_to_do_on_a_kernel_without_userfaultfd(
        self, knob: Path, run: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        knob.unlink()
        done = run()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_fails_where_it_cannot_close_it(
        self, knob: Path, run: Callable[[], subprocess.CompletedProcess[str]]
    ) -> None:
        knob.unlink()
        knob.mkdir()
        done = run()
        assert done.returncode == 1
        assert done.stdout.startswith("<2>uffdguard.service has failed, no policy is in force, and vm.unprivileged_")

    def test_the_native_file_is_uncovered_where_nobody_serves_the_cover(
        self, root: Path, knob: Path, run: Callable[[str], subprocess.CompletedProcess[str]]
    ) -> None:
        """The kernel's part is played by umount(8): it takes the line out of the table of mounts."""
        done = run("uncover")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not (root / "unmounted").exists()
        knob.unlink()
        with (root / "bin/umount").open("a") as script:
            script.write(f": >{root}/mounts\n")
        done = run("uncover")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (root / "unmounted").read_text() == f"-a -l -t fuse.uffdguard\n-l {root}/hidden {root}/hidden/proc\n"
        assert not (root / "hidden").exists()
