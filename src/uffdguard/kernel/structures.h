/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What guard.bpf.c and inspect.bpf.c know of the kernel: only what is used of its structures; CO-RE finds the offsets. */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#define CAP_SYS_PTRACE 19
#define CAP_SYS_ADMIN 21
#define FMODE_PATH 0x4000
#define KVM_RDEV ((10 << 20) | 232) /* MISC_MAJOR, KVM_MINOR, in the kernel's own dev_t */
#define S_IFMT 0170000
#define S_IFCHR 0020000

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct super_block {
	__u32 s_dev;
	unsigned long s_magic;
};

struct inode {
	unsigned short i_mode;
	__u32 i_rdev;
	struct super_block *i_sb;
	unsigned long i_ino;
};

struct qstr {
	__u32 len;
	const unsigned char *name;
};

struct dentry {
	struct qstr d_name;
};

struct path {
	struct dentry *dentry;
};

struct file {
	unsigned int f_mode;
	struct path f_path;
	struct inode *f_inode;
};

struct fdtable {
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct mm_struct {
	struct file *exe_file;
};

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct user_namespace {
	struct user_namespace *parent;
	int level;
	kuid_t owner;
};

typedef struct {
	__u64 val;
} kernel_cap_t;

struct cred {
	kuid_t uid;
	kuid_t euid;
	kgid_t egid;
	kernel_cap_t cap_effective;
	struct user_namespace *user_ns;
};

typedef struct {
	__u32 cap[2];
} kernel_cap_t___until_6_2;

struct cred___until_6_2 {
	kernel_cap_t___until_6_2 cap_effective;
};

struct task_struct {
	struct mm_struct *mm;
	int pid;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct files_struct *files;
	__u64 self_exec_id;
	const struct cred *real_cred;
	const struct cred *cred;
	char comm[16];
};

struct bpf_iter_meta {
	struct seq_file *seq;
};

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};

struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	__u32 fd;
	struct file *file;
};

#pragma clang attribute pop

static __always_inline int is_kvm(const struct file *file)
{
	return (file->f_inode->i_mode & S_IFMT) == S_IFCHR && file->f_inode->i_rdev == KVM_RDEV;
}

/* Whether a capability of the lower 32 is effective, in whatever user namespace. */
static __always_inline int has_capability(const struct cred *cred, int number)
{
	const struct cred___until_6_2 *older = (const void *)cred;
	__u64 capabilities = bpf_core_field_exists(older->cap_effective.cap) ? older->cap_effective.cap[0] :
									       cred->cap_effective.val;

	return capabilities >> number & 1;
}
