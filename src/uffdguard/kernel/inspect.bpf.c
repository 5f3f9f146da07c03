// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What decide() of guard.bpf.c would find in each thread, and who has a userfaultfd or /dev/kvm open.
 *
 * Two iterators that write records for inspect.py; nothing here is attached to a hook.
 */
#include "structures.h"
#include "grants.h" /* guard.bpf.c's map in its place, where a policy is in force; else one that is empty */

#define ANON_INODE_FS_MAGIC 0x09041934

/*
 * The records, which layout.py has as well. They are global for their types to be in this object's BTF; each load has
 * its own, and is run by one process at a time.
 */
struct thread {
	int tgid;
	int tid;
	__u32 uid; /* the effective one */
	__u8 granted;
	__u8 effective; /* CAP_SYS_PTRACE, in whatever user namespace */
	__u8 initial; /* in the initial user namespace */
	__u8 unused;
	char comm[16]; /* of the process: of the thread that began it */
};

struct thread thread SEC(".data.thread") = {};

struct descriptor {
	__u64 file; /* an address: the same for all descriptors of one open file */
	int tgid;
	__u32 kvm; /* of /dev/kvm; else of a userfaultfd */
};

struct descriptor descriptor SEC(".data.descriptor") = {};

SEC("iter/task")
int threads(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	const struct cred *cred;

	if (!task || !task->mm) /* the kernel's own, or at its end */
		return 0;
	cred = task->real_cred; /* not what it acts by for the time of a system call */

	thread.tgid = task->tgid;
	thread.tid = task->pid;
	thread.uid = cred->euid.val;
	thread.granted = is_granted(task);
	thread.effective = has_capability(cred, CAP_SYS_PTRACE);
	thread.initial = cred->user_ns->level == 0;
	bpf_probe_read_kernel_str(thread.comm, sizeof(thread.comm), task->group_leader->comm);
	bpf_seq_write(ctx->meta->seq, &thread, sizeof(thread));
	return 0;
}

/* By its name on the file system of anonymous inodes, where the kernel alone gives names; told as in guard.bpf.c. */
static __always_inline int is_userfaultfd(struct file *file)
{
	__u64 head = 0;

	return file->f_inode->i_sb->s_magic == ANON_INODE_FS_MAGIC &&
	       BPF_CORE_READ(file, f_path.dentry, d_name.len) == 13 &&
	       !bpf_probe_read_kernel(&head, sizeof(head), BPF_CORE_READ(file, f_path.dentry, d_name.name)) &&
	       head == *(const __u64 *)"[userfau";
}

/* A thread that shares the descriptors of its leader is passed over; threads whose leader has ended are not. */
SEC("iter/task_file")
int descriptors(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;

	if (!task || !file || (file->f_mode & FMODE_PATH))
		return 0;
	descriptor.kvm = is_kvm(file);
	if (!descriptor.kvm && !is_userfaultfd(file))
		return 0;
	descriptor.file = (__u64)file;
	descriptor.tgid = task->tgid;
	bpf_seq_write(ctx->meta->seq, &descriptor, sizeof(descriptor));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
