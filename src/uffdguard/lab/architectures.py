"""What differs between the architectures of the lab, in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """An architecture that the lab emulates, with a real /dev/kvm."""

    name: str  # Debian's
    machine: str  # as `uname -m` prints it, and in the name of QEMU's program
    qemu_package: str
    #: Of QEMU: what gives the guest the CPU that its KVM needs.
    options: tuple[str, ...] = ()
    #: For the kernel's command line.
    parameters: tuple[str, ...] = ()
    #: The module that makes /dev/kvm; None: KVM is built into the kernel.
    kvm_module: str | None = None

    @property
    def qemu(self) -> str:
        """The name of the program of QEMU."""
        return f"qemu-system-{self.machine}"


AMD64 = Architecture(
    name="amd64",
    machine="x86_64",
    qemu_package="qemu-system-x86",
    # The kernel sees at boot whether the timer interrupts within 10 ticks, and panics when it does not, check_timer()
    # of arch/x86/kernel/apic/io_apic.c: on a busy machine an emulated one does not always.
    parameters=("no_timer_check",),
    kvm_module="kvm_amd",
)

ARM64 = Architecture(
    name="arm64",
    machine="aarch64",
    qemu_package="qemu-system-arm",
    # KVM needs EL2. On the CPU "max" Python runs a third as fast: it has more that an emulated CPU takes its time for.
    options=("-machine", "virt,virtualization=on,gic-version=3", "-cpu", "cortex-a76"),
)

ARCHITECTURES = {architecture.name: architecture for architecture in (AMD64, ARM64)}


def of_release(release: str) -> Architecture:
    """Return the architecture of a kernel, by its RELEASE as ``uname -r`` prints it."""
    return ARCHITECTURES[release.rpartition("-")[2]]
