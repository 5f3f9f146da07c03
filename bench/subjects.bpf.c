// SPDX-License-Identifier: GPL-2.0-or-later
/* What guard.bpf.c is measured against. */
#include "structures.h"
#include "grants.h"
#include <bpf/bpf_tracing.h>

/* The floor: what the kernel takes to call any program on the hook of decide(). */
SEC("lsm/inode_init_security_anon")
int BPF_PROG(empty)
{
	return 0;
}

/* The obvious way to see who opens /dev/kvm: the hook of every open. */
SEC("lsm/file_open")
int BPF_PROG(watch_opens, struct file *file, int ret)
{
	struct inode *inode = file->f_inode;
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 *grant;

	if (ret || (inode->i_mode & S_IFMT) != S_IFCHR || inode->i_rdev != KVM_RDEV)
		return ret;
	grant = bpf_task_storage_get(&grants, task->group_leader, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (grant)
		*grant = task->self_exec_id + 1;
	return 0;
}

/* A hook that no subject may have: the check of the committed figures must see it. */
SEC("fentry/do_sys_openat2")
int BPF_PROG(intruder)
{
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
