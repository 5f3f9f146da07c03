// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Who may create a userfaultfd, and who has opened /dev/kvm.
 *
 * decide() is the twin of decide() in policy.py: a row there is a row here. The other programs keep the set
 * of address spaces that have opened /dev/kvm, which is what mode `kvm` asks about.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#define EPERM 1
#define EACCES 13
#define EEXIST 17

#define CAP_SYS_PTRACE 19
#define FMODE_PATH 0x4000
#define KVM_RDEV ((10 << 20) | 232) /* MISC_MAJOR, KVM_MINOR, in the kernel's own dev_t */
#define S_IFMT 0170000
#define S_IFCHR 0020000

#define USERFAULTFD_IOC_NEW 0xaa00
#define UFFD_USER_MODE_ONLY 1
#define TS_COMPAT 0x0002 /* arch/x86/include/asm/thread_info.h: a 32-bit system call is being served */
#define X32_SYSCALL_BIT 0x40000000

/* The kernel's structures, only what is used of them; CO-RE finds the offsets at load. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__u64 ctx_id; /* arch/x86/include/asm/mmu.h: unique for ever, never 0 */
} mm_context_t;

struct mm_struct {
	mm_context_t context;
};

struct user_namespace {
	int level;
};

typedef struct {
} kernel_cap_t;

struct cred {
	kernel_cap_t cap_effective;
	struct user_namespace *user_ns;
};

struct thread_info {
	__u32 status;
};

struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	struct mm_struct *mm;
	int tgid;
	const struct cred *cred;
};

struct pt_regs {
	unsigned long bx, cx, dx, si, di, orig_ax;
};

struct inode {
	unsigned short i_mode;
	__u32 i_rdev;
};

struct file {
	unsigned int f_mode;
	struct inode *f_inode;
};

struct qstr {
	__u32 len;
	const unsigned char *name;
};

struct bpf_iter__task_file {
	struct task_struct *task;
	struct file *file;
};

#pragma clang attribute pop

/* policy.Mode and policy.Reason, in their order; layout.py compares them with this object's BTF at load. */
enum mode {
	MODE_DISABLED,
	MODE_ENABLED,
	MODE_KVM,
};

enum reason {
	REASON_CAPABILITY,
	REASON_ENABLED,
	REASON_USER_MODE_ONLY,
	REASON_KVM,
	REASON_DISABLED,
	REASON_NO_KVM,
	NR_REASONS,
};

/* The policy is one byte, because a byte is written at once on every path there is from user space to here. */
union policy {
	__u8 word;
	struct policy_bits {
		enum mode mode : 2;
		__u8 user_mode_only : 1;
	} __attribute__((packed)) bits;
};

union policy policy SEC(".data.policy") = {};

struct counts {
	__u64 decisions[NR_REASONS];
	__u64 grants; /* address spaces in the map */
	__u64 lost; /* grants that could not be recorded */
};

struct counts counts SEC(".data.counts") = {};

/*
 * The one process whose decisions `uffdguard start` watches before it trusts this program. While `strict`, it
 * is decided about as if the mode were `disabled`, so that a refusal can be seen whatever the mode; and refused
 * with EACCES, which no other refusal gives, so that in an upgrade the older program, which is attached as well,
 * cannot be what refused. Each load of this object has its own. What it asks is no use of userfaultfd, and is not
 * among the counts.
 */
struct witness {
	int tgid;
	__u32 strict;
	__u32 decisions;
	enum reason reason; /* of the last of them */
};

volatile struct witness witness SEC(".data.witness") = {};

/*
 * The address spaces that have opened /dev/kvm, by mm->context.ctx_id. The kernel never gives an id twice, so
 * an entry that outlives its address space, because the kernel skipped forget(), can grant nothing.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u8);
} grants SEC(".maps");

/* Where the kernel has the name, a constant of its own, once it has been compared: to read it costs 85 instructions. */
const unsigned char *volatile compared SEC(".data.compared") = 0;

/* "[userfaultfd]", by its length and its first eight bytes: a string compare costs 200 instructions. */
static __always_inline int is_userfaultfd(const struct qstr *name)
{
	const unsigned char *address = name->name;
	__u64 head = 0;

	if (name->len != 13)
		return 0;
	if (address == compared)
		return 1;
	if (bpf_probe_read_kernel(&head, sizeof(head), address) || head != *(const __u64 *)"[userfau")
		return 0;
	compared = address;
	return 1;
}

static __always_inline void count(__u64 *counter, __s64 change)
{
	__sync_fetch_and_add(counter, change);
}

/* Whether this call set UFFD_USER_MODE_ONLY, read where its own ABI has its flags; unsure means no. */
static __always_inline int asks_user_mode_only(struct task_struct *task)
{
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	__u32 nr = regs->orig_ax; /* the kernel, too, looks at the low half only */

	if (task->thread_info.status & TS_COMPAT) {
		if (nr == 374)
			return regs->bx & UFFD_USER_MODE_ONLY;
		return nr == 54 && (__u32)regs->cx == USERFAULTFD_IOC_NEW && (regs->dx & UFFD_USER_MODE_ONLY);
	}
	if ((nr & ~X32_SYSCALL_BIT) == 323)
		return regs->di & UFFD_USER_MODE_ONLY;
	return (nr == 16 || nr == (X32_SYSCALL_BIT | 514)) && (__u32)regs->si == USERFAULTFD_IOC_NEW &&
	       (regs->dx & UFFD_USER_MODE_ONLY);
}

static __always_inline int is_privileged(const struct cred *cred)
{
	/* An array of two words up to 6.2, one double word since: the first 32 capabilities come first in both. */
	__u64 offset = bpf_core_field_offset(cred->cap_effective);
	__u32 effective;

	barrier_var(offset); /* libbpf does not relocate the load of a struct, only its address */
	effective = *(const __u32 *)((const void *)cred + offset);

	/* Only the initial user namespace has level 0: `unshare -U` gives anybody the capability in another. */
	return (effective & (1U << CAP_SYS_PTRACE)) && cred->user_ns->level == 0;
}

static __always_inline enum reason reason_of(struct task_struct *task, union policy policy)
{
	if (is_privileged(task->cred))
		return REASON_CAPABILITY;
	if (policy.bits.mode == MODE_ENABLED)
		return REASON_ENABLED;
	if (policy.bits.user_mode_only && asks_user_mode_only(task))
		return REASON_USER_MODE_ONLY;
	if (policy.bits.mode == MODE_KVM) {
		__u64 id = task->mm->context.ctx_id;

		return bpf_map_lookup_elem(&grants, &id) ? REASON_KVM : REASON_NO_KVM;
	}
	return REASON_DISABLED;
}

SEC("lsm/inode_init_security_anon")
int BPF_PROG(decide, struct inode *inode, const struct qstr *name, const struct inode *context_inode, int ret)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 context = 0;
	union policy now = { .word = *(volatile __u8 *)&policy.word };
	enum reason reason;
	int is_witness, strict;

	if (ret)
		return ret;

	if (!is_userfaultfd(name))
		return 0;

	/*
	 * A context inode means that an existing userfaultfd hands out a child's on a fork event: no creation.
	 * Read the argument as a number: the verifier of 6.12 takes the pointer for never NULL, finds
	 * `if (context_inode) return 0;` always true, and removes the rest of this program as dead code.
	 */
	bpf_get_func_arg(ctx, 2, &context);
	if (context)
		return 0;

	is_witness = task->tgid == witness.tgid;
	strict = is_witness && witness.strict;
	if (strict)
		now = (union policy){};

	reason = reason_of(task, now);
	if (reason >= NR_REASONS) /* never; the verifier cannot know */
		return -EPERM;
	if (is_witness) {
		witness.reason = reason;
		witness.decisions++;
	} else {
		count(&counts.decisions[reason], 1);
	}
	if (reason < REASON_DISABLED)
		return 0;
	return strict ? -EACCES : -EPERM;
}

/* Returns whether the entry is new. */
static __always_inline int record(__u64 id)
{
	__u8 value = 1;
	long error;

	if (!id || bpf_map_lookup_elem(&grants, &id))
		return 0;
	error = bpf_map_update_elem(&grants, &id, &value, BPF_NOEXIST);
	if (error) {
		if (error != -EEXIST) /* another thread has opened it too */
			count(&counts.lost, 1);
		return 0;
	}
	count(&counts.grants, 1);
	return 1;
}

static __always_inline void erase(__u64 id)
{
	if (bpf_map_lookup_elem(&grants, &id) && !bpf_map_delete_elem(&grants, &id))
		count(&counts.grants, -1);
}

/* fexit, because only a successful open counts; misc_open, because it runs for misc devices alone. */
SEC("fexit/misc_open")
int BPF_PROG(grant, struct inode *inode, struct file *file, int ret)
{
	if (!ret && inode->i_rdev == KVM_RDEV)
		record(bpf_get_current_task_btf()->mm->context.ctx_id);
	return 0;
}

SEC("fentry/exit_mmap")
int BPF_PROG(forget, struct mm_struct *mm)
{
	erase(mm->context.ctx_id);
	return 0;
}

/* Run once, at the first start: who holds /dev/kvm already has opened it before we could see. */
SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct mm_struct *mm;
	__u64 id;

	if (!task || !file || (file->f_mode & FMODE_PATH) || file->f_inode->i_rdev != KVM_RDEV ||
	    (file->f_inode->i_mode & S_IFMT) != S_IFCHR)
		return 0;

	mm = task->mm;
	if (!mm)
		return 0;
	id = mm->context.ctx_id;
	/* The task may have left this address space meanwhile, and forget() may have come before the entry. */
	if (record(id) && *(struct mm_struct *volatile *)&task->mm != mm)
		erase(id);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
