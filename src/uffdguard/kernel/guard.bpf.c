// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Who may create a userfaultfd, and who has opened /dev/kvm.
 *
 * decide() is the twin of decide() in policy.py: a row there is a row here. The other programs record who opens
 * /dev/kvm, which is what mode `kvm` asks about (grants.h), and count what the kernel refuses before it asks.
 * guard_sysctl() refuses the sysctls that would undo all this. tell() is where a decision becomes an event.
 */
#include "structures.h"
#include "grants.h"
#include <bpf/bpf_tracing.h>

#define EPERM 1
#define EACCES 13

#define USERFAULTFD_IOC_NEW 0xaa00
#define UFFD_USER_MODE_ONLY 1

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
		__u8 audit : 1; /* count and tell refusals, and let them pass */
	} __attribute__((packed)) bits;
};

union policy policy SEC(".data.policy") = {};

struct tally {
	__u64 decisions[NR_REASONS];
	__u64 native; /* refused by the kernel's own knob, before any hook */
	__u64 let_pass; /* refused in audit: not really */
	__u64 suppressed; /* events over a limit */
	__u64 lost; /* grants that could not be recorded */
	__u64 sysctl; /* writes of a sysctl that guard_sysctl() refused */
	__u64 unused[5]; /* two cache lines in all */
};

/*
 * The sum is what counts. A tally for each CPU, so that none waits for another; of more than 64 some share one. The
 * changes are atomic, since a decision may be preempted by another, too. A per-CPU map would have one for each, and take
 * six instructions more to find it.
 */
#define TALLIES 64

struct counts {
	struct tally of[TALLIES];
};

struct counts counts SEC(".data.counts") = {};

/*
 * The one process whose decisions `uffdguard start` watches before it trusts this program. While `strict`, it
 * is decided about as if the mode were `disabled`, so that a refusal can be seen whatever the mode; and refused
 * with EACCES, which no other refusal gives, so that in an upgrade the older program, which is attached as well,
 * cannot be what refused. Each load of this object has its own. What it asks is no use of userfaultfd, and is not
 * among the counts. Beside it, and read as one with it, is until when somebody wants to see what is allowed to others.
 */
struct witness {
	int tgid;
	__u32 all_until; /* s since boot */
	__u32 strict;
	__u32 decisions;
	enum reason reason; /* of the last of them */
	__u32 questions; /* that guard_sysctl() has refused */
	__u32 until; /* s since boot: then the trial was killed, and its pid may be another's */
	__u32 unused;
} __attribute__((aligned(8)));

volatile struct witness witness SEC(".data.witness") = {};

/* What keeps the policy in force, beside the policy itself. A later version finds room here: the map is kept. */
struct enforcement {
	__u32 knob; /* the value that vm.unprivileged_userfaultfd is to have */
	__u32 zero; /* stays 0, see guard_sysctl() */
	__u64 unanswered_since; /* ns since boot: the policy was seen not to answer; 0: it answers */
	__u64 skips_seen; /* hooks that the kernel has skipped, at the last start */
	__u64 lost_seen; /* grants that could not be recorded, at the last start */
	__u64 room[4];
};

volatile struct enforcement enforcement SEC(".data.enforcement") = {};

enum way {
	WAY_SYSCALL,
	WAY_COMPAT,
	WAY_X32,
	WAY_DEVICE,
};

#include "arch/x86.h"
#include "arch/arm64.h"

/* What guard_sysctl() has refused to write, if an event is of that. */
enum sysctl {
	SYSCTL_NONE,
	SYSCTL_FTRACE_ENABLED,
	SYSCTL_NATIVE,
};

/* A decision, for events.py; or a refused sysctl, whose `flags` are the number that was to be written. */
struct event {
	__u64 number; /* from 1 */
	__u64 time; /* ns since boot */
	__u64 cgroup;
	__u64 exe_inode;
	__u32 exe_device; /* the kernel's own dev_t */
	int pid;
	int tid;
	__u32 uid; /* effective, as is gid */
	__u32 gid;
	__u32 owner;
	__u32 flags;
	enum way way : 8;
	enum reason reason : 8; /* NR_REASONS: the kernel's own knob */
	enum mode mode : 8;
	__u8 enforced;
	__u8 initial;
	__u8 capability;
	__u8 granted;
	enum sysctl sysctl : 8;
	char command[16];
	char executable[40]; /* its file's name, without the directories */
};

#define EVENTS 2048

struct slot {
	struct bpf_spin_lock lock;
	struct event event;
};

/*
 * The newest events, by their number. No ring buffer of BPF's: that has one reader, whose end leaves it full, and what
 * was read is gone. Here there may be none or many, and who comes late sees what was.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, EVENTS);
	__type(key, __u32);
	__type(value, struct slot);
} events SEC(".maps");

struct watching {
	__u64 told; /* the number of the newest event */
	__u64 window; /* of all, see take() */
	__u32 per_owner; /* events a second */
	__u32 total;
	__u32 round; /* another each time that see_native() is attached */
	__u32 unused;
};

volatile struct watching watching SEC(".data.watching") = { .per_owner = 20, .total = 1000, .round = 1 };

/* What was told in a second, see take(): of an owner's refusals, of what an owner was allowed, of a control group. */
enum window {
	WINDOW_REFUSED,
	WINDOW_ALLOWED,
	WINDOW_GROUP,
};

struct window_key {
	__u64 whose;
	__u64 what;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct window_key);
	__type(value, __u64);
} windows SEC(".maps");

/* By what decide() tells see_native() that it has refused the call that this task is in: the round. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} refused SEC(".maps");

/*
 * Where the kernel has two things that are there for ever, once they were seen: the name, which takes 85 instructions
 * to read, and the initial user namespace, the only one of level 0. To compare an address takes four.
 */
const unsigned char *volatile seen_name SEC(".data.seen") = 0;
const struct user_namespace *volatile seen_initial SEC(".data.seen") = 0;

/* A name of 13 characters, by its first eight: to compare all costs 200 instructions. */
static __noinline int is_userfaultfd(const unsigned char *name)
{
	__u64 head = 0;

	if (bpf_probe_read_kernel(&head, sizeof(head), name) || head != *(const __u64 *)"[userfau")
		return 0;
	seen_name = name;
	return 1;
}

/* `unshare -U` gives anybody the capability in another. */
static __noinline int is_initial(const struct user_namespace *ns)
{
	if (ns->level != 0)
		return 0;
	seen_initial = ns;
	return 1;
}

#define count(what, change) __sync_fetch_and_add(&counts.of[bpf_get_smp_processor_id() % TALLIES].what, change)

/* What this call asks for, read where its own ABI has its flags; what cannot be told has none. */
static __always_inline enum way way_of(struct task_struct *task, __u32 *flags)
{
	const void *regs = (const void *)bpf_task_pt_regs(task);

	return is_arm64(regs) ? way_on_arm64(regs, flags) : way_on_x86(task, regs, flags);
}

static __noinline int asks_user_mode_only(struct task_struct *task)
{
	__u32 flags;

	way_of(task, &flags);
	return flags & UFFD_USER_MODE_ONLY;
}

static __always_inline int is_privileged(const struct cred *cred)
{
	return has_capability(cred, CAP_SYS_PTRACE) && (cred->user_ns == seen_initial || is_initial(cred->user_ns));
}

/* Not static, as tell() is not: the verifier looks at such a function once, not in each state that calls it. */
__noinline int ancestor_of_current_has_opened_kvm(void)
{
	return ancestor_has_opened_kvm(bpf_get_current_task_btf());
}

static __always_inline int is_current_granted(struct task_struct *task)
{
	return has_opened_kvm(task) || ancestor_of_current_has_opened_kvm();
}

static __always_inline enum reason reason_of(struct task_struct *task, union policy policy)
{
	if (is_privileged(task->cred))
		return REASON_CAPABILITY;
	if (policy.bits.mode == MODE_ENABLED)
		return REASON_ENABLED;
	if (policy.bits.user_mode_only && asks_user_mode_only(task))
		return REASON_USER_MODE_ONLY;
	if (policy.bits.mode == MODE_KVM)
		return is_current_granted(task) ? REASON_KVM : REASON_NO_KVM;
	return REASON_DISABLED;
}

/* Takes one of LIMIT events of the second NOW; WINDOW has the second, and how many were asked for in it. */
static __always_inline int take(volatile __u64 *window, __u64 now, __u32 limit)
{
	__u64 before = *window;

	if (before >> 32 < now)
		__sync_val_compare_and_swap(window, before, now << 32);
	return (__u32)__sync_fetch_and_add(window, 1) < limit;
}

/* Whose limit an event counts against: all user namespaces of a user, and those in them, have one between them. */
static __always_inline __u32 owner_of(const struct cred *cred)
{
	struct user_namespace *ns = cred->user_ns;
	int i;

	if (ns->level == 0)
		return cred->uid.val;
	for (i = 0; i < 32 && ns->level > 1; i++) /* kernel/user_namespace.c: no deeper than 32 */
		ns = ns->parent;
	return ns->owner.val;
}

static __always_inline int take_of(enum window what, __u64 whose, __u64 now, __u32 limit)
{
	struct window_key key = { whose, what };
	__u64 *window, fresh = 0;

	window = bpf_map_lookup_elem(&windows, &key);
	if (!window) {
		bpf_map_update_elem(&windows, &key, &fresh, BPF_NOEXIST);
		window = bpf_map_lookup_elem(&windows, &key);
	}
	return window && take(window, now, limit);
}

/*
 * Whether this event is told. A control group of the second level is a user's slice, a service or a container: who can
 * become many users, by setuid programs of subordinate uids say, stays in one.
 */
static __always_inline int is_told(enum reason reason, __u32 owner, __u64 now)
{
	__u64 group = bpf_get_current_ancestor_cgroup_id(2);

	return take_of(reason < REASON_DISABLED ? WINDOW_ALLOWED : WINDOW_REFUSED, owner, now, watching.per_owner) &&
	       (!group || take_of(WINDOW_GROUP, group, now, 5 * watching.per_owner)) &&
	       take(&watching.window, now, watching.total);
}

/* What an event says of the task that is running; returns whether it is told. */
static __always_inline int describe(struct event *event, enum reason reason)
{
	struct task_struct *task = bpf_get_current_task_btf();
	const struct cred *cred = task->cred;
	__u64 now = bpf_ktime_get_boot_ns();
	struct file *executable;

	event->owner = owner_of(cred);
	if (!is_told(reason, event->owner, now / 1000000000)) {
		count(suppressed, 1);
		return 0;
	}
	event->time = now;
	event->pid = task->tgid;
	event->tid = task->pid;
	event->uid = cred->euid.val;
	event->gid = cred->egid.val;
	event->cgroup = bpf_get_current_cgroup_id();
	executable = task->mm->exe_file;
	if (executable) {
		event->exe_inode = executable->f_inode->i_ino;
		event->exe_device = executable->f_inode->i_sb->s_dev;
		bpf_probe_read_kernel_str(event->executable, sizeof(event->executable),
					  BPF_CORE_READ(executable, f_path.dentry, d_name.name));
	}
	event->reason = reason;
	event->initial = cred->user_ns->level == 0;
	event->capability = is_privileged(cred);
	bpf_get_current_comm(event->command, sizeof(event->command));
	return 1;
}

static __always_inline void publish(struct slot *slot)
{
	__u32 key;

	slot->event.number = __sync_fetch_and_add(&watching.told, 1) + 1;
	key = slot->event.number % EVENTS;
	bpf_map_update_elem(&events, &key, slot, BPF_F_LOCK);
}

__noinline int tell(enum reason reason, __u32 policy, int enforced)
{
	struct task_struct *task = bpf_get_current_task_btf();
	union policy then = { .word = policy };
	struct slot slot = {};
	struct event *event = &slot.event;
	__u32 flags;

	if (!describe(event, reason))
		return 0;
	event->way = way_of(task, &flags);
	event->flags = flags;
	event->mode = then.bits.mode;
	event->enforced = enforced;
	event->granted = is_current_granted(task);
	publish(&slot);
	return 0;
}

/* Of a decision, beside the byte of the policy. The sign is what is tested for most cheaply. */
#define SPECIAL (1U << 31)
#define WITNESS (1U << 30)
#define STRICT (1U << 29)

/*
 * What no call needs that is allowed is in functions of its own: it would have each save registers for it. All calls,
 * the witness's too, go through the same decide().
 */
static __noinline __u32 attend(struct task_struct *task, __u32 now)
{
	__u32 time = bpf_ktime_get_boot_ns() / 1000000000, until = witness.all_until;
	int tgid = witness.tgid;

	/* What nobody waits for any more is taken away: let all calls that follow go without this. */
	if (tgid && time >= witness.until)
		__sync_val_compare_and_swap(&witness.tgid, tgid, 0);
	else if (task->tgid == tgid)
		return SPECIAL | WITNESS | (witness.strict ? STRICT : now);
	if (time < until)
		return SPECIAL | now;
	__sync_val_compare_and_swap(&witness.all_until, until, 0);
	return now;
}

static __noinline int note(enum reason reason, __u32 now)
{
	if (now & WITNESS) {
		witness.reason = reason;
		witness.decisions++;
		return 0;
	}
	count(decisions[reason], 1);
	if (reason < REASON_DISABLED)
		tell(reason, now, 1);
	return 0;
}

static __noinline int refuse(enum reason reason, __u32 now)
{
	union policy policy = { .word = now };
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 flags, *mark;

	if (!(now & WITNESS)) {
		if (policy.bits.audit)
			count(let_pass, 1);
		else if (way_of(task, &flags) != WAY_DEVICE) {
			mark = bpf_task_storage_get(&refused, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
			if (mark)
				*mark = watching.round;
		}
		tell(reason, now, !policy.bits.audit);
	}
	if (policy.bits.audit)
		return 0;
	return now & STRICT ? -EACCES : -EPERM;
}

SEC("lsm/inode_init_security_anon")
int BPF_PROG(decide, struct inode *inode, const struct qstr *name, const struct inode *context_inode, int ret)
{
	struct task_struct *task;
	enum reason reason;
	__u64 least = 1;
	__u32 now;

	if (ret)
		return ret;

	if (name->name != seen_name && (name->len != 13 || !is_userfaultfd(name->name)))
		return 0;

	/*
	 * A context inode means that an existing userfaultfd hands out a child's on a fork event: no creation.
	 * Compare it with what clang does not know to be 1: the verifier of 6.12 takes the pointer for never NULL, finds
	 * `if (context_inode) return 0;` always true, and removes the rest of this program as dead code.
	 */
	barrier_var(least);
	if ((__u64)context_inode >= least)
		return 0;

	task = bpf_get_current_task_btf();
	now = *(volatile __u8 *)&policy.word;
	if (*(volatile __u64 *)&witness)
		now = attend(task, now);

	reason = reason_of(task, (union policy){ .word = now });
	if (now & SPECIAL)
		note(reason, now);
	else
		count(decisions[reason], 1);
	if (reason >= REASON_DISABLED)
		return refuse(reason, now);
	return 0;
}

/*
 * In mode `disabled` the kernel's own knob is 0, and then it refuses most calls before it comes to a hook. Attached
 * only while the knob is 0: elsewhere an allowed call would pay for it.
 */
static __always_inline int see_native(long ret)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 *mark;

	if (ret != -EPERM || task->tgid == witness.tgid)
		return 0;
	/* A mark of an earlier round is of a call that we were not there to see the end of. */
	mark = bpf_task_storage_get(&refused, task, 0, 0);
	if (mark && *mark == watching.round) {
		*mark = 0;
		return 0;
	}
	count(native, 1);
	return tell(NR_REASONS, policy.word, 1);
}

/* These two are of what arch/__init__.py says. */
SEC("fexit/__x64_sys_userfaultfd")
int BPF_PROG(native, const struct pt_regs *regs, long ret)
{
	return see_native(ret);
}

SEC("fexit/__ia32_sys_userfaultfd")
int BPF_PROG(native32, const struct pt_regs *regs, long ret)
{
	return see_native(ret);
}

/* TASK has opened /dev/kvm: so has everybody above it who has its address space, MM. */
static __always_inline void record(struct task_struct *task, struct mm_struct *mm, __u64 exec_id)
{
	__u64 *grant;
	int i;

	UNROLLED
	for (i = 0; i < GENERATIONS; i++) {
		grant = bpf_task_storage_get(&grants, task->group_leader, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
		if (!grant)
			count(lost, 1);
		else if (*grant <= exec_id) /* an ancestor may have opened it in a later program meanwhile */
			*grant = exec_id + 1;
		task = parent_of(task);
		if (i == 0 && !parent_shares_mm(task, mm))
			return;
		/* The id first: one that execs changes its address space before it. */
		exec_id = exec_id_of(task);
		if (!shares_mm(task, mm))
			return;
	}
}

/* fexit, because only a successful open counts; misc_open, because it runs for misc devices alone. */
SEC("fexit/misc_open")
int BPF_PROG(grant, struct inode *inode, struct file *file, int ret)
{
	struct task_struct *task;
	struct mm_struct *mm;

	if (!ret && inode->i_rdev == KVM_RDEV) {
		task = bpf_get_current_task_btf();
		mm = task->mm;
		if (mm) /* no kernel thread, all of which have that in common */
			record(task, mm, task->self_exec_id);
	}
	return 0;
}

/* Run once, at the first start: who holds /dev/kvm already has opened it before we could see. */
SEC("iter/task_file")
int seed(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file, **files, *still = NULL;
	struct mm_struct *mm;
	__u64 exec_id;

	if (!task || !file || (file->f_mode & FMODE_PATH) || !is_kvm(file))
		return 0;
	/* An exec closes files before it raises the id: one that is still open is open to the program of this id. */
	exec_id = *(volatile __u64 *)&task->self_exec_id;
	files = BPF_CORE_READ(task, files, fdt, fd);
	if (bpf_probe_read_kernel(&still, sizeof(still), &files[ctx->fd]) || still != file)
		return 0;
	mm = task->mm;
	if (mm) /* no kernel thread, and not at its end */
		record(task, mm, exec_id);
	return 0;
}

/* Those who are granted: the process of each thread that would be allowed. */
SEC("iter/task")
int granted(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	int tgid;

	if (!task || !task->mm || !is_granted(task))
		return 0;
	tgid = task->tgid;
	bpf_seq_write(ctx->meta->seq, &tgid, sizeof(tgid));
	return 0;
}

static __always_inline int administers(const struct cred *cred)
{
	return has_capability(cred, CAP_SYS_ADMIN) && cred->user_ns->level == 0;
}

/*
 * The threads that may change the policy, by their numbers in the initial pid namespace. Not the kernel's own, which act
 * for others. Both credentials must do: an overlay file system acts for its user by those of whoever mounted it, and a
 * worker of io_uring, which has those of an earlier time, by those of the request.
 */
SEC("iter/task")
int administrators(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	int tid;

	if (!task || !task->mm || !administers(task->real_cred) || !administers(task->cred))
		return 0;
	tid = task->pid;
	bpf_seq_write(ctx->meta->seq, &tid, sizeof(tid));
	return 0;
}

__noinline int tell_sysctl(enum sysctl which, __u32 value)
{
	struct slot slot = {};

	count(sysctl, 1);
	if (!describe(&slot.event, NR_REASONS))
		return 0;
	slot.event.sysctl = which;
	slot.event.flags = value;
	slot.event.mode = policy.bits.mode;
	slot.event.enforced = 1;
	publish(&slot);
	return 0;
}

#define NOT_A_DIGIT 0xffffffff

/* The one digit in TEXT, with nothing but blanks after it. */
static __always_inline __u32 digit_in(const char *text, int size)
{
	int i;

	for (i = 1; i < size; i++)
		if (text[i] > ' ')
			return NOT_A_DIGIT;
	return text[0] >= '0' && text[0] <= '9' ? text[0] - '0' : NOT_A_DIGIT;
}

/*
 * kernel.ftrace_enabled = 0 turns all programs on trampolines off, LSM programs included, and nothing tells. This one
 * needs no trampoline. It is on the root of the default hierarchy, so that no mount namespace and no container is out
 * of its reach. Who writes "?" to the native knob wants to know whether it is there: without it that is EINVAL.
 */
SEC("cgroup/sysctl")
int guard_sysctl(struct bpf_sysctl *ctx)
{
	/*
	 * bpf_sysctl_get_name() pads nothing. The verifiers of 6.14 to 6.16 take these for never written by the helpers,
	 * and remove what compares them as dead code, unless the values before are unknown to them.
	 */
	__u64 zero = enforcement.zero, name[4] = { zero, zero, zero, zero }, text = zero;
	enum sysctl which;
	__u32 value;
	int length;

	if (!ctx->write)
		return 1;
	length = bpf_sysctl_get_name(ctx, (char *)name, sizeof(name), 0);
	if (length == sizeof("kernel/ftrace_enabled") - 1 && name[0] == *(const __u64 *)"kernel/f" &&
	    name[1] == *(const __u64 *)"trace_en" && name[2] == *(const __u64 *)"abled\0\0")
		which = SYSCTL_FTRACE_ENABLED;
	else if (length == sizeof("vm/unprivileged_userfaultfd") - 1 && name[0] == *(const __u64 *)"vm/unpri" &&
		 name[1] == *(const __u64 *)"vileged_" && name[2] == *(const __u64 *)"userfaul" &&
		 name[3] == *(const __u64 *)"tfd\0\0\0\0")
		which = SYSCTL_NATIVE;
	else
		return 1;

	length = bpf_sysctl_get_new_value(ctx, (char *)&text, sizeof(text));
	value = length < 0 ? NOT_A_DIGIT : digit_in((char *)&text, sizeof(text));
	if (which == SYSCTL_NATIVE && *(char *)&text == '?') {
		__sync_fetch_and_add(&witness.questions, 1);
		return 0;
	}
	if (which == SYSCTL_NATIVE && policy.bits.audit)
		return 1;
	if (value == (which == SYSCTL_NATIVE ? enforcement.knob : 1))
		return 1;
	tell_sysctl(which, value);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
