"""Address spaces come and go in the same memory: no grant passes to a later one, and nothing is left of it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from inside import ACTOR, USER, actor, kernel_memory, load, preemptible

from uffdguard import guard, state
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
        # forget is skipped too, now and then.
        assert lost + status.grants <= status.skipped
        assert status.failing == ["hooks-not-skipped"]
        assert status.problems[0].startswith("the kernel skipped a program of the policy ")
        assert guard.start(Policy(), None).changed
        assert (state.status().failing, state.status().skipped >= lost) == ([], True)

    def test_what_a_skipped_forget_leaves_behind_grants_nobody(
        self, variant: Callable[..., None], in_force: Callable[..., None]
    ) -> None:
        variant(
            'SEC("fentry/exit_mmap")\nint BPF_PROG(forget, struct mm_struct *mm)\n{\n\t',
            f'{SLOW}SEC("fentry/exit_mmap")\nint BPF_PROG(forget, struct mm_struct *mm)\n{{\n\t{LOOP}',
        )
        in_force("kvm")

        def left_behind() -> int:
            assert at_once("generations:20") == [20] * 8
            return state.status().grants

        with preemptible():
            assert until_there(left_behind) <= state.status().skipped
        assert actor("generations:100") == ["100"]
