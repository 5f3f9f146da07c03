/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How a system call asks for a userfaultfd on arm64. */
#define PSR_MODE32_BIT 0x10 /* arch/arm64/include/uapi/asm/ptrace.h: a 32-bit program runs; none can leave this mode */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct pt_regs___arm64 {
	__u64 regs[31];
	__u64 pstate;
	int syscallno;
};

#pragma clang attribute pop

static __always_inline int is_arm64(const void *of_task)
{
	return bpf_core_field_exists(((const struct pt_regs___arm64 *)of_task)->syscallno);
}

static __always_inline enum way way_on_arm64(const void *of_task, __u32 *flags)
{
	const struct pt_regs___arm64 *regs = of_task;
	int compat = regs->pstate & PSR_MODE32_BIT;
	int nr = regs->syscallno;

	if (nr == (compat ? 388 : 282)) {
		*flags = regs->regs[0];
		return compat ? WAY_COMPAT : WAY_SYSCALL;
	}
	*flags = nr == (compat ? 54 : 29) && (__u32)regs->regs[1] == USERFAULTFD_IOC_NEW ? regs->regs[2] : 0;
	return WAY_DEVICE;
}
