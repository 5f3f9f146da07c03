"""Processes come and go: no grant passes to a later one, none is left, and as many as there are have theirs."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from inside import ACTOR, USER, actor, kernel_memory, load, preemptible, until, waiting_actor

from uffdguard import guard, state
from uffdguard.kernel import features
from uffdguard.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

#: Keeps a program of ours busy for longer than a time slice.
SLOW = """static long nothing(__u32 index, void *context)
{
	return 0;
}

"""
LOOP = "bpf_loop(1 << 18, nothing, 0, 0);\n\t"


@pytest.fixture(autouse=True)
def mode(request: pytest.FixtureRequest, in_force: Callable[..., None]) -> None:
    if "variant" not in request.fixturenames:
        in_force("kvm")


def at_once(*steps: str) -> list[int]:
    """Let eight actors, on two CPUs, do STEPS at the same time; return the number that each has printed."""
    actors = [
        subprocess.Popen([ACTOR, *steps], user=USER, group=USER, extra_groups=[], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    numbers = [int(process.communicate()[0]) for process in actors]
    assert all(process.returncode == 0 for process in actors)
    return numbers


def until_there(number: Callable[[], int]) -> int:
    """Return the first NUMBER that is not 0, of twenty."""
    return next(filter(None, (number() for _ in range(20))))


def test_an_address_space_opens_kvm_and_dies_and_the_next_one_is_refused(steps: int) -> None:
    generations = min(5 * steps, 20_000)
    assert actor(f"generations:{generations}") == [str(generations)]
    assert state.status().grants == 0


def test_and_so_it_is_on_a_preemptible_kernel_under_load(steps: int) -> None:
    with preemptible(), load():
        assert actor(f"generations:{steps}") == [str(steps)]


def test_opens_without_end_take_no_kernel_memory(steps: int) -> None:
    opens = min(250 * steps, 1_000_000)
    actor("opens:10000")
    before = kernel_memory()
    actor(f"opens:{opens}")
    grown = kernel_memory() - before
    print(f"{opens} opens: {grown:+} KiB of kernel memory")
    # A file of each is more, and so is an entry.
    assert grown < opens * 64 // 1024 // 2


def test_processes_that_open_kvm_and_end_leave_nothing_behind(steps: int) -> None:
    number = min(10 * steps, 1_000_000)
    actor("deaths:500")
    before = kernel_memory()
    actor(f"deaths:{number}")
    # What each left would be a grant and the storage that it is in. The kernel frees some of it a little later.
    until(lambda: kernel_memory() - before < number * 256 // 1024 // 2)
    print(f"{number} processes: {kernel_memory() - before:+} KiB of kernel memory")
    assert (state.status().grants, state.status().lost) == (0, 0)


def test_as_many_as_there_are_at_once_are_granted(steps: int) -> None:
    number = min(10 * steps, 25_000)
    before = kernel_memory()
    with waiting_actor(f"crowd:{number}", "wait", user=0):
        status = state.status()
        print(f"{number} processes, {status.grants} granted: {kernel_memory() - before:+} KiB of kernel memory")
        # The kernel may skip the hook of one.
        assert number - status.skipped <= status.grants <= number
        assert status.lost == 0
    until(lambda: state.status().grants == 0)


def test_a_granted_process_is_refused_by_mistake_only_where_a_busy_storage_hides_the_grant(steps: int) -> None:
    """Before 6.2 a task that is preempted in a storage hides all storages on its CPU until it runs again."""
    number = 25 * steps
    with preemptible(), load():
        refused = at_once(f"flood-after-kvm:{number}")
        status = state.status()
    print(f"{8 * number} questions by granted processes: {sum(refused)} refused; {status.lost} grants lost")
    if features.hides_grants():
        assert "grants-found" in status.failing
        assert max(refused) < number // 2
    else:
        assert sum(refused) == 0


class TestSkipped:
    """The kernel skips a tracing program where it has preempted it on the same CPU: made likely by slow ones."""

    def test_a_skipped_grant_is_lost_until_the_next_open_and_named_until_a_start_has_seen_it(
        self, variant: Callable[..., None], in_force: Callable[..., None]
    ) -> None:
        variant(
            'SEC("fexit/misc_open")\nint BPF_PROG(grant, struct inode *inode, struct file *file, int ret)\n{\n\t',
            f'{SLOW}SEC("fexit/misc_open")\n'
            f"int BPF_PROG(grant, struct inode *inode, struct file *file, int ret)\n{{\n\t{LOOP}",
        )
        in_force("kvm")
        with preemptible():
            lost = until_there(lambda: sum(at_once("until-allowed:20")))
        status = state.status()
        assert lost <= status.skipped
        assert status.failing == ["hooks-not-skipped"]
        assert status.problems[0].startswith("the kernel skipped a program of the policy ")
        assert guard.start(Policy(), None).changed
        assert (state.status().failing, state.status().skipped >= lost) == ([], True)
