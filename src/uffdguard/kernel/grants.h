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

/* How many processes one above the other are asked. */
#define GENERATIONS 16

static __always_inline int has_opened_kvm(struct task_struct *task)
{
	__u64 *grant = bpf_task_storage_get(&grants, task->group_leader, 0, 0);

	return grant && *grant == *(volatile __u64 *)&task->self_exec_id + 1;
}

static __always_inline struct task_struct *parent_of(struct task_struct *task)
{
	return task->group_leader->real_parent; /* not `parent`, which may be one that traces it */
}

static __always_inline int shares_mm(struct task_struct *task, struct mm_struct *mm)
{
	return *(struct mm_struct *volatile *)&task->mm == mm;
}

/* The way up from a task, from one process to the next. */
struct climb {
	struct task_struct *task;
	struct mm_struct *mm; /* the address space that they have in common */
	__u64 exec_id; /* of the task */
	int found;
};

static long ask(__u32 index, struct climb *climb)
{
	struct task_struct *task = climb->task;

	/* An ancestor that execs meanwhile may have opened it in its new address space: look at that last. */
	if (has_opened_kvm(task)) {
		climb->found = shares_mm(task, climb->mm);
		return 1;
	}
	climb->task = parent_of(task);
	return !shares_mm(climb->task, climb->mm);
}

/*
 * Of the task that is running the answer is exact: no other address space takes the place of its own meanwhile.
 *
 * The verifier would walk through a loop of ours as many times as it may run, on each path to it, and it searches all
 * of the kernel's types for every pointer that is followed: it took a second. It walks through bpf_loop() once or twice.
 */
static __noinline int ancestor_has_opened_kvm(struct task_struct *task)
{
	struct climb climb = { .task = parent_of(task), .mm = task->mm };

	if (!climb.mm) /* at its end, as it may be where an iterator looks */
		return 0;
	if (!shares_mm(climb.task, climb.mm)) /* so it is with nearly everybody */
		return 0;
	bpf_loop(GENERATIONS, ask, &climb, 0);
	return climb.found;
}

static __always_inline int is_granted(struct task_struct *task)
{
	return has_opened_kvm(task) || ancestor_has_opened_kvm(task);
}
