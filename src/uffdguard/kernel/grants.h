/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Who has opened /dev/kvm: what guard.bpf.c grants and asks about, and what inspect.bpf.c shows.
 *
 * The flag of the process's address space is kept where the kernel lets BPF keep something: in the storage of the
 * thread-group leader, as self_exec_id at the time of the open, plus 1. It holds while the id is the same. Threads share
 * both. A fork is another task, without storage. An exec raises the id once the new address space is in place, before
 * any of the new program runs (fs/exec.c, begin_new_exec()); a thread that is not the leader becomes it by exec, and has
 * no storage. The storage ends with the task. So there is nothing to erase, and no map that one user could fill.
 *
 * A relative by CLONE_VM that is no thread, as after vfork(2), has a leader of its own: an open is recorded for the
 * parent too, and its parent's, as long as the address space is the same, and likewise they are asked.
 */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} grants SEC(".maps");

/*
 * How many processes one above the other are asked. A loop and not bpf_loop(), which neither kernels before 5.17 have
 * nor those that interpret programs; unrolled, since the verifier takes some loops of clang's for endless. It walks
 * through each round on each path to it, and for each pointer that is followed it searches the kernel's types: what is
 * only compared is read by a helper, but for the parent, where nearly everybody's search ends and the helper's time
 * would count.
 */
#define GENERATIONS 8
#define UNROLLED _Pragma("clang loop unroll(full)")

static __always_inline int holds(struct task_struct *task, __u64 exec_id)
{
	__u64 *grant = bpf_task_storage_get(&grants, task->group_leader, 0, 0);

	return grant && *grant == exec_id + 1;
}

static __always_inline int has_opened_kvm(struct task_struct *task)
{
	return holds(task, *(volatile __u64 *)&task->self_exec_id);
}

static __always_inline __u64 exec_id_of(struct task_struct *task)
{
	return BPF_CORE_READ(task, self_exec_id);
}

static __always_inline int shares_mm(struct task_struct *task, struct mm_struct *mm)
{
	return BPF_CORE_READ(task, mm) == mm;
}

static __always_inline int parent_shares_mm(struct task_struct *parent, struct mm_struct *mm)
{
	return *(struct mm_struct *volatile *)&parent->mm == mm;
}

static __always_inline struct task_struct *parent_of(struct task_struct *task)
{
	return task->group_leader->real_parent; /* not `parent`, which may be one that traces it */
}

/* Of the task that is running the answer is exact: no other address space takes the place of its own meanwhile. */
static __always_inline int ancestor_has_opened_kvm(struct task_struct *task)
{
	struct mm_struct *mm = task->mm;
	int i;

	if (!mm) /* at its end, as it may be where an iterator looks */
		return 0;
	UNROLLED
	for (i = 0; i < GENERATIONS; i++) {
		task = parent_of(task);
		if (!(i ? shares_mm(task, mm) : parent_shares_mm(task, mm)))
			return 0;
		/* An ancestor that execs meanwhile may have opened it in its new address space: look at that last. */
		if (holds(task, exec_id_of(task)))
			return shares_mm(task, mm);
	}
	return 0;
}

static __always_inline int is_granted(struct task_struct *task)
{
	return has_opened_kvm(task) || ancestor_has_opened_kvm(task);
}
