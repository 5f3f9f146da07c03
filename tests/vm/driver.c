// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a subject of the model runs: it enters the kernel as it is told over a socket, and tells what the kernel
 * answered. It chooses every register itself, and comes as a 64-bit and as a 32-bit program: so it does without
 * a C library, and its threads are the kernel's own.
 */
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/io_uring.h>
#include <linux/mman.h>
#include <linux/sched.h>

#define SOL_SOCKET 1
#define SCM_RIGHTS 1
#define MSG_CMSG_CLOEXEC 0x40000000
#define STACK (1 << 14)
#define RING (1 << 14)

typedef unsigned long word;

enum operation { ENTER, ENTER_32, SPAWN, EXEC, URING };

/* subjects.py has these two as well. */
struct command {
	__u32 operation;
	__u32 pointers; /* a bit for each register that is an offset into data */
	/* By their names on x86: ax, bx, cx, dx, si, di, bp, r10, r8, r9; the last three in 64-bit programs alone. */
	__u64 registers[10];
	char data[256];
};

struct answer {
	__s64 result;
	__s32 pid, tid;
	__s32 received; /* the descriptor that came with the command */
	__u32 unused;
	char data[256]; /* of the command, as the kernel left it */
};

enum { AX, BX, CX, DX, SI, DI, BP, R10, R8, R9, REGISTERS };

struct message {
	void *name;
	int name_length;
	struct {
		void *base;
		word length;
	} *parts;
	word number;
	void *control;
	word control_length;
	unsigned int flags;
};

struct control {
	word length;
	int level, type, fd;
};

word enter(const word *registers, int compat);
word spawn(word flags, void *stack, int socket);
_Noreturn void start(word *stack);
_Noreturn void serve(int socket);

/* spawn()'s child begins on the new stack, or on its copy of ours, and has the socket in a register. */
#ifdef __x86_64__
asm(".globl _start, enter, spawn\n"
    "_start: mov %rsp, %rdi; and $-16, %rsp; call start\n"
    "enter: push %rbx; push %rbp; push %r12; mov %rdi, %r12; test %esi, %esi\n"
    "	mov (%r12), %rax; mov 8(%r12), %rbx; mov 16(%r12), %rcx; mov 24(%r12), %rdx; mov 32(%r12), %rsi\n"
    "	mov 40(%r12), %rdi; mov 48(%r12), %rbp; mov 56(%r12), %r10; mov 64(%r12), %r8; mov 72(%r12), %r9\n"
    "	jnz 1f; syscall; jmp 2f\n"
    "1:	int $0x80; cltq\n"
    "2:	pop %r12; pop %rbp; pop %rbx; ret\n"
    "spawn: push %r12; mov %edx, %r12d; xor %edx, %edx; xor %r10d, %r10d; xor %r8d, %r8d; mov $56, %eax; syscall\n"
    "	test %eax, %eax; jz 3f; pop %r12; ret\n"
    "3:	and $-16, %rsp; mov %r12d, %edi; call serve\n");
static const char arguments[] = { DI, SI, DX, R10, R8, R9 };
#elif defined(__aarch64__)
/* ax is x8; di, si, dx, r10, r8 and r9 are x0 to x5; cx is x7, where a 32-bit program has the number. */
asm(".globl _start, enter, spawn\n"
    "_start: mov x0, sp; bl start\n"
    "enter: mov x9, x0; ldr x8, [x9]; ldr x6, [x9, #8]; ldr x7, [x9, #16]; ldr x10, [x9, #48]\n"
    "	ldr x0, [x9, #40]; ldr x1, [x9, #32]; ldr x2, [x9, #24]; ldr x3, [x9, #56]; ldr x4, [x9, #64]; ldr x5, [x9, #72]\n"
    "	svc #0; ret\n"
    "spawn: mov w9, w2; mov x2, #0; mov x3, #0; mov x4, #0; mov x8, #220; svc #0; cbz x0, 3f; ret\n"
    "3:	mov w0, w9; bl serve\n");
static const char arguments[] = { DI, SI, DX, R10, R8, R9 };
#elif defined(__arm__)
/* ax is r7; bx, cx, dx, si, di and bp are r0 to r5. */
asm(".globl _start, enter, spawn\n"
    "_start: mov r0, sp; bl start\n"
    "enter: push {r4-r8, lr}; mov r8, r0; ldr r7, [r8]; ldr r0, [r8, #4]; ldr r1, [r8, #8]; ldr r2, [r8, #12]\n"
    "	ldr r3, [r8, #16]; ldr r4, [r8, #20]; ldr r5, [r8, #24]; svc #0; pop {r4-r8, pc}\n"
    "spawn: push {r4, r7, r8, lr}; mov r8, r2; mov r2, #0; mov r3, #0; mov r4, #0; mov r7, #120; svc #0\n"
    "	cmp r0, #0; beq 3f; pop {r4, r7, r8, pc}\n"
    "3:	mov r0, r8; bl serve\n");
static const char arguments[] = { BX, CX, DX, SI, DI, BP };
#else
asm(".globl _start, enter, spawn\n"
    "_start: mov %esp, %eax; and $-16, %esp; sub $12, %esp; push %eax; call start\n"
    "enter: push %ebx; push %esi; push %edi; push %ebp; mov 20(%esp), %ebp\n"
    "	mov (%ebp), %eax; mov 4(%ebp), %ebx; mov 8(%ebp), %ecx; mov 12(%ebp), %edx; mov 16(%ebp), %esi\n"
    "	mov 20(%ebp), %edi; mov 24(%ebp), %ebp; int $0x80; pop %ebp; pop %edi; pop %esi; pop %ebx; ret\n"
    "spawn: push %ebx; push %esi; push %edi; push %ebp; mov 20(%esp), %ebx; mov 24(%esp), %ecx; mov 28(%esp), %ebp\n"
    "	xor %edx, %edx; xor %esi, %esi; xor %edi, %edi; mov $120, %eax; int $0x80\n"
    "	test %eax, %eax; jz 3f; pop %ebp; pop %edi; pop %esi; pop %ebx; ret\n"
    "3:	and $-16, %esp; sub $12, %esp; push %ebp; call serve\n");
static const char arguments[] = { BX, CX, DX, SI, DI, BP };
#endif

/* One for all who share the address space: only one of them is asked at a time, and the others wait for theirs. */
static struct command command;

void *memset(void *target, int byte, word length)
{
	for (char *end = target; length--;)
		*end++ = byte;
	return target;
}

void *memcpy(void *target, const void *source, word length)
{
	for (char *to = target, *from = (char *)source; length--;)
		*to++ = *from++;
	return target;
}

#define call(nr, ...) call_(nr, (word[6]){ __VA_ARGS__ })
static long call_(int nr, const word *values)
{
	word registers[REGISTERS] = { nr };

	for (int i = 0; i < 6; i++)
		registers[(int)arguments[i]] = values[i];
	return enter(registers, 0);
}

static void *map(int fd, word offset, word length)
{
#ifdef __LP64__
	int nr = __NR_mmap;
#else
	int nr = __NR_mmap2;

	offset >>= 12;
#endif
	return (void *)call(nr, 0, length, PROT_READ | PROT_WRITE,
			    fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED | MAP_POPULATE, fd, offset);
}

/* IORING_OP_OPENAT: at once, by a worker (IOSQE_ASYNC), or by the kernel's thread (IORING_SETUP_SQPOLL). */
static long uring_open(const char *path, int flags, int sqe_flags, int setup)
{
	struct io_uring_params at = { .flags = setup, .sq_thread_idle = 1000 };
	int ring = call(__NR_io_uring_setup, 1, (word)&at);
	volatile char *rings;
	struct io_uring_sqe *sqe;
	volatile __u32 *head, *tail;
	long result;

	if (ring < 0)
		return ring;
	rings = map(ring, IORING_OFF_SQ_RING, RING);
	sqe = map(ring, IORING_OFF_SQES, sizeof(*sqe));
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_OPENAT;
	sqe->flags = sqe_flags;
	sqe->fd = AT_FDCWD;
	sqe->addr = (word)path;
	sqe->open_flags = flags;
	*(volatile __u32 *)(rings + at.sq_off.array) = 0;
	__atomic_store_n((__u32 *)(rings + at.sq_off.tail), 1, __ATOMIC_RELEASE);
	head = (__u32 *)(rings + at.cq_off.head);
	tail = (__u32 *)(rings + at.cq_off.tail);
	do
		result = call(__NR_io_uring_enter, ring, 1, 1,
			      IORING_ENTER_GETEVENTS | (setup & IORING_SETUP_SQPOLL ? IORING_ENTER_SQ_WAKEUP : 0));
	while (result >= 0 && *head == *tail);
	if (result >= 0)
		result = ((struct io_uring_cqe *)(rings + at.cq_off.cqes))->res;
	call(__NR_munmap, (word)rings, RING);
	call(__NR_munmap, (word)sqe, sizeof(*sqe));
	call(__NR_close, ring);
	return result;
}

static long exec(int socket)
{
	char number[] = { '0' + socket / 100, '0' + socket / 10 % 10, '0' + socket % 10, 0 };
	const char *values[] = { command.data, number, (char *)0 };

	call(__NR_fcntl, socket, F_SETFD, 0);
	return call(__NR_execve, (word)command.data, (word)values, (word)&values[2]);
}

static long execute(int socket, int received)
{
	word registers[REGISTERS];
	long result;

	for (int i = 0; i < REGISTERS; i++)
		registers[i] = command.registers[i] + (command.pointers & 1 << i ? (word)command.data : 0);
	switch ((enum operation)command.operation) {
	case ENTER:
		return enter(registers, 0);
	case ENTER_32:
		return enter(registers, 1);
	case SPAWN:
		result = spawn(registers[BX], registers[BX] & CLONE_VM ? (char *)map(-1, 0, STACK) + STACK : (char *)0,
			       received);
		if (!(registers[BX] & CLONE_FILES))
			call(__NR_close, received);
		return result;
	case EXEC:
		return exec(socket);
	case URING:
		return uring_open(command.data, registers[BX], registers[CX], registers[DX]);
	}
	return -1;
}

_Noreturn void serve(int socket)
{
	struct answer answer = {};

	for (;;) {
		struct control control = { .fd = -1 };
		struct message message = { .number = 1, .control = &control, .control_length = sizeof(control) };

		answer.pid = call(__NR_getpid);
		answer.tid = call(__NR_gettid);
		if (call(__NR_sendto, socket, (word)&answer, sizeof(answer)) != sizeof(answer))
			break;
		message.parts = (void *)&(struct { void *base; word length; }){ &command, sizeof(command) };
		if (call(__NR_recvmsg, socket, (word)&message, MSG_CMSG_CLOEXEC) != sizeof(command))
			break;
		answer.received = control.fd;
		answer.result = execute(socket, control.fd);
		memcpy(answer.data, command.data, sizeof(answer.data));
	}
	call(__NR_exit_group, 1);
	__builtin_unreachable();
}

_Noreturn void start(word *stack)
{
	const char *number = ((const char **)stack)[2];

	serve((number[0] - '0') * 100 + (number[1] - '0') * 10 + number[2] - '0');
}
