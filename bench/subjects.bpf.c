// SPDX-License-Identifier: GPL-2.0-or-later
/* What guard.bpf.c is measured against. */
#include "structures.h"
#include <bpf/bpf_tracing.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, __u8);
} opened SEC(".maps");

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
	__u8 value = 1;
	__u64 id;

	if (ret || (inode->i_mode & S_IFMT) != S_IFCHR || inode->i_rdev != KVM_RDEV)
		return ret;
	id = bpf_get_current_task_btf()->mm->context.ctx_id;
	if (!bpf_map_lookup_elem(&opened, &id))
		bpf_map_update_elem(&opened, &id, &value, BPF_ANY);
	return 0;
}

/* A hook that no subject may have: the check of the committed figures must see it. */
SEC("fentry/do_sys_openat2")
int BPF_PROG(intruder)
{
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
