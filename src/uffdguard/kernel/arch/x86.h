/* SPDX-License-Identifier: GPL-2.0-or-later */
/* How a system call asks for a userfaultfd on x86-64. */
#define TS_COMPAT 0x0002 /* arch/x86/include/asm/thread_info.h: a 32-bit system call is being served */
#define X32_SYSCALL_BIT 0x40000000

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct pt_regs___x86 {
	unsigned long bx, cx, dx, si, di, orig_ax;
};

struct thread_info___x86 {
	__u32 status;
};

struct task_struct___x86 {
	struct thread_info___x86 thread_info;
};

#pragma clang attribute pop

static __always_inline enum way way_on_x86(struct task_struct *task, const void *of_task, __u32 *flags)
{
	const struct pt_regs___x86 *regs = of_task;
	__u32 nr = regs->orig_ax; /* the kernel, too, looks at the low half only */

	if (((struct task_struct___x86 *)task)->thread_info.status & TS_COMPAT) {
		if (nr == 374) {
			*flags = regs->bx;
			return WAY_COMPAT;
		}
		*flags = nr == 54 && (__u32)regs->cx == USERFAULTFD_IOC_NEW ? regs->dx : 0;
		return WAY_DEVICE;
	}
	if ((nr & ~X32_SYSCALL_BIT) == 323) {
		*flags = regs->di;
		return nr == 323 ? WAY_SYSCALL : WAY_X32;
	}
	*flags = (nr == 16 || nr == (X32_SYSCALL_BIT | 514)) && (__u32)regs->si == USERFAULTFD_IOC_NEW ? regs->dx : 0;
	return WAY_DEVICE;
}
