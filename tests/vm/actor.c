// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A process that does what its arguments say, in order, and prints what each question was answered: one line
 * each, "allowed" or the errno's name. A step such as `fork` lets the rest of the arguments happen in the new
 * process, thread or program, and waits for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW 0xaa00
#endif

static int opened = -1; /* what the last open gave */
static char **older_steps; /* what the older thread shall do */
static pthread_barrier_t handover;
static pid_t parent_of_orphan;

static void run(char **steps);

static void fail(const char *what)
{
	dprintf(2, "actor: %s: %s\n", what, strerror(errno));
	_exit(99);
}

/* Print an answer by write(2): the relatives of a CLONE_VM share stdio's buffers. */
static void answer(long result)
{
	const char *name = result >= 0 ? "allowed" : strerrorname_np(-result);

	if (dprintf(1, "%s\n", name ? name : "?") < 0)
		_exit(98);
}

static void answer_and_close(long fd)
{
	answer(fd);
	if (fd >= 0)
		close(fd);
}

/*
 * A 64-bit system call whose other registers the caller chooses: the last is one where another ABI has its flags. And
 * the 32-bit system call of a 64-bit program, where there is such a thing; di and si are where the 64-bit ABI has its
 * arguments.
 */
#ifdef __x86_64__
#define USERFAULTFD32 374
#define IOCTL32 54

static long syscall64(long nr, long di, long si, long dx, long bx)
{
	long result;

	asm volatile("syscall" : "=a"(result) : "a"(nr), "D"(di), "S"(si), "d"(dx), "b"(bx), "c"(bx) : "r11", "memory");
	return result;
}

static long syscall32(long nr, long bx, long cx, long dx, long di, long si)
{
	long result;

	asm volatile("int $0x80"
		     : "=a"(result)
		     : "a"(nr), "b"(bx), "c"(cx), "d"(dx), "D"(di), "S"(si)
		     : "r8", "r9", "r10", "r11", "memory");
	return (int)result;
}
#else
#define USERFAULTFD32 SYS_userfaultfd
#define IOCTL32 SYS_ioctl

static long syscall64(long nr, long first, long second, long third, long other)
{
	register long number asm("x8") = nr, x0 asm("x0") = first, x1 asm("x1") = second, x2 asm("x2") = third;
	register long x3 asm("x3") = other;

	asm volatile("svc 0" : "+r"(x0) : "r"(number), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
}

static long syscall32(long nr, long first, long second, long third, long other, long unused)
{
	(void)unused;
	return syscall64(nr, first, second, third, other);
}
#endif

static int device(void)
{
	int fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		fail("/dev/userfaultfd");
	return fd;
}

/* The same with an odd number: rdi then says user mode only where another call would have its flags. */
static int odd_device(void)
{
	int fd;

	do
		fd = fcntl(device(), F_DUPFD, 101);
	while (!(fd & 1));
	return fd;
}

static int drop_capability(int lost)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	if (syscall(SYS_capget, &header, data))
		return -1;
	data[0].effective &= ~(1U << lost);
	data[0].permitted &= ~(1U << lost);
	data[0].inheritable &= ~(1U << lost);
	return syscall(SYS_capset, &header, data);
}

/* Become another user; with `keep`, with just CAP_SYS_PTRACE. */
static void become(int id, int keep)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = {};

	if (keep && prctl(PR_SET_KEEPCAPS, 1))
		fail("PR_SET_KEEPCAPS");
	if (setresgid(id, id, id) || setresuid(id, id, id))
		fail("setresuid");
	if (!keep)
		return;
	data[0].effective = data[0].permitted = 1U << CAP_SYS_PTRACE;
	if (syscall(SYS_capset, &header, data))
		fail("capset");
}

/* Let another process open PATH, and receive the descriptor. */
static int received(const char *path)
{
	char control[CMSG_SPACE(sizeof(int))] = {}, byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header;
	int ends[2], fd;

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
		fail("socketpair");
	if (!fork()) {
		fd = open(path, O_RDWR);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &fd, sizeof(fd));
		_exit(fd < 0 || sendmsg(ends[1], &message, 0) != 1);
	}
	if (recvmsg(ends[0], &message, 0) != 1)
		fail("recvmsg");
	header = CMSG_FIRSTHDR(&message);
	if (!header)
		fail("nothing received");
	memcpy(&fd, CMSG_DATA(header), sizeof(fd));
	wait(NULL);
	return fd;
}

/* Every other way to an anonymous inode; the names are printed with the answers. */
static void others(void)
{
	unsigned char parameters[120] = {};
	sigset_t none;

	sigemptyset(&none);
#define OTHER(name, call)                                                                          \
	do {                                                                                       \
		long fd = (call);                                                                  \
		dprintf(1, "%s %s\n", name, fd >= 0 ? "allowed" : strerrorname_np(errno));         \
		if (fd >= 0)                                                                       \
			close(fd);                                                                 \
	} while (0)
	OTHER("io_uring", syscall(SYS_io_uring_setup, 4, parameters));
	OTHER("eventfd", eventfd(0, 0));
	OTHER("memfd", memfd_create("x", 0));
	OTHER("memfd_secret", syscall(SYS_memfd_secret, 0));
	OTHER("timerfd", timerfd_create(CLOCK_MONOTONIC, 0));
	OTHER("signalfd", signalfd(-1, &none, 0));
	OTHER("pidfd", syscall(SYS_pidfd_open, getpid(), 0));
	OTHER("epoll", syscall(SYS_epoll_create1, 0));
	OTHER("fanotify", syscall(SYS_fanotify_init, 0x200, O_RDONLY));
}

/* One address space opens /dev/kvm and dies, the next one asks, round and round; print how many were refused. */
static void generations(long number)
{
	int uffd = device(), status;
	long refused = 0;

	for (; number > 0; number--) {
		if (!fork())
			_exit(open("/dev/kvm", O_RDWR) < 0);
		if (wait(&status) < 0 || status)
			fail("/dev/kvm");
		if (!fork())
			_exit(ioctl(uffd, USERFAULTFD_IOC_NEW, 0) < 0 && errno == EPERM);
		wait(&status);
		refused += WIFEXITED(status) && WEXITSTATUS(status) == 1;
	}
	dprintf(1, "%ld\n", refused);
}

/* The same without a question, for ever. */
static void churn(void)
{
	for (;; wait(NULL))
		if (!fork())
			_exit(open("/dev/kvm", O_RDWR));
}

/* Address spaces that open /dev/kvm until they are allowed; print how many the first open did not grant. */
static void until_allowed(long number)
{
	int uffd = device(), status;
	long lost = 0;

	for (; number > 0; number--) {
		if (!fork()) {
			for (int first = 1;; first = 0) {
				int fd = open("/dev/kvm", O_RDWR);

				if (fd < 0)
					fail("/dev/kvm");
				close(fd);
				if (ioctl(uffd, USERFAULTFD_IOC_NEW, 0) >= 0)
					_exit(!first);
			}
		}
		wait(&status);
		if (!WIFEXITED(status) || WEXITSTATUS(status) > 1)
			fail("until-allowed");
		lost += WEXITSTATUS(status);
	}
	dprintf(1, "%ld\n", lost);
}

/* So many that open /dev/kvm and end. */
static void deaths(long number)
{
	int status;

	for (; number > 0; number--) {
		if (!fork())
			_exit(open("/dev/kvm", O_RDWR) < 0);
		if (wait(&status) < 0 || status)
			fail("/dev/kvm");
	}
}

/* Processes that open /dev/kvm and stay until we end. */
static void crowd(long number)
{
	int ready = eventfd(0, EFD_SEMAPHORE);
	eventfd_t one;

	for (long i = 0; i < number; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fail("fork");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (open("/dev/kvm", O_RDWR) < 0 || eventfd_write(ready, 1))
				_exit(1);
			pause();
			_exit(0);
		}
	}
	for (long i = 0; i < number; i++)
		if (eventfd_read(ready, &one))
			fail("crowd");
	dprintf(1, "%ld\n", number);
}

static void *toucher(void *page)
{
	return (void *)(long)*(volatile char *)page;
}

static void *forker(void *unused)
{
	if (!fork())
		_exit(0);
	wait(NULL);
	return unused;
}

/* A userfaultfd made with privilege and used without: a fault is served, and a fork hands out the child's. */
static void use_existing(int user)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK };
	long size = sysconf(_SC_PAGESIZE);
	char *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register range = { .range = { (long)page, size }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	char *source = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_copy copy = { .dst = (long)page, .src = (long)source, .len = size };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct pollfd ready = { fd, POLLIN, 0 };
	struct uffd_msg message;
	pthread_t thread;
	void *seen;

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		fail("userfaultfd");
	become(user, 0);
	source[0] = 42;
	pthread_create(&thread, NULL, toucher, page);
	if (poll(&ready, 1, 10000) != 1 || read(fd, &message, sizeof(message)) != sizeof(message) ||
	    message.event != UFFD_EVENT_PAGEFAULT || ioctl(fd, UFFDIO_COPY, &copy))
		fail("fault");
	pthread_join(thread, &seen);
	dprintf(1, "%ld\n", (long)seen);
	pthread_create(&thread, NULL, forker, NULL);
	if (poll(&ready, 1, 10000) != 1 || read(fd, &message, sizeof(message)) != sizeof(message))
		fail("fork event");
	dprintf(1, "%s\n", message.event == UFFD_EVENT_FORK && (int)message.arg.fork.ufd >= 0 ? "handed" : "not handed");
	close(message.arg.fork.ufd);
	pthread_join(thread, NULL);
}

/*
 * Have PATH as our executable, as CRIU does where it restores. The kernel refuses that while the old one is mapped: each
 * of its mappings gives way to a copy in the same place.
 */
static void set_executable(const char *path)
{
	struct prctl_mm_map map = { .brk = (long)sbrk(0), .exe_fd = open(path, O_RDONLY) };
	__u64 *found[] = { [26] = &map.start_code, [27] = &map.end_code,   [28] = &map.start_stack,
			   [45] = &map.start_data, [46] = &map.end_data,   [47] = &map.start_brk,
			   [48] = &map.arg_start,  [49] = &map.arg_end,    [50] = &map.env_start,
			   [51] = &map.env_end };
	char text[1 << 14] = "", own[4096] = "", mode[5], *line, *word;
	int maps = open("/proc/self/maps", O_RDONLY), stat = open("/proc/self/stat", O_RDONLY), field = 2;
	long length = 0, part;
	unsigned long from, to;

	if (map.exe_fd == (__u32)-1 || readlink("/proc/self/exe", own, sizeof(own) - 1) < 0)
		fail(path);
	while ((part = read(maps, text + length, sizeof(text) - 1 - length)) > 0)
		length += part;
	for (line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		if (!strstr(line, own) || sscanf(line, "%lx-%lx %4s", &from, &to, mode) != 3)
			continue;
		void *copy = mmap(NULL, to - from, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (copy == MAP_FAILED)
			fail("mmap");
		memcpy(copy, (void *)from, to - from);
		if (mprotect(copy, to - from,
			     (mode[0] == 'r' ? PROT_READ : 0) | (mode[1] == 'w' ? PROT_WRITE : 0) |
				     (mode[2] == 'x' ? PROT_EXEC : 0)) ||
		    mremap(copy, to - from, to - from, MREMAP_MAYMOVE | MREMAP_FIXED, from) == MAP_FAILED)
			fail("mremap");
	}
	text[read(stat, text, sizeof(text) - 1)] = 0;
	for (word = strtok(strrchr(text, ')') + 1, " "); word; word = strtok(NULL, " "))
		if (++field < 52 && found[field])
			*found[field] = strtoul(word, NULL, 10);
	if (prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof(map), 0))
		fail("PR_SET_MM_MAP");
}

static void await(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, __WALL) != pid || status)
		fail("the rest went wrong");
}

/* Ask so many times, and print how many were refused. */
static void flood(long number, int device)
{
	long fd, refused = 0;

	while (number--) {
		fd = device < 0 ? syscall64(SYS_userfaultfd, 0, 0, 0, 0) :
				  syscall64(SYS_ioctl, device, USERFAULTFD_IOC_NEW, 0, 0);
		if (fd >= 0)
			close(fd);
		refused += fd == -EPERM;
	}
	dprintf(1, "%ld\n", refused);
}

static void *new_stack(void)
{
	long size = 1 << 16;
	char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (stack == MAP_FAILED)
		fail("mmap");
	return stack + size;
}

static int open_kvm(void *unused)
{
	(void)unused;
	_exit(open("/dev/kvm", O_RDWR) < 0);
}

/* Be traced by a child that has opened /dev/kvm. */
static void be_traced(void)
{
	int ready = eventfd(0, 0);
	eventfd_t one;
	pid_t parent = getpid(), pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		while (ptrace(PTRACE_SEIZE, parent, 0, 0) && errno == EPERM) /* Yama: until our parent says so */
			usleep(1000);
		if (open("/dev/kvm", O_RDWR) < 0 || eventfd_write(ready, 1))
			_exit(1);
		for (;;)
			pause();
	}
	prctl(PR_SET_PTRACER, pid);
	if (eventfd_read(ready, &one))
		fail("be-traced");
}

static int rest_of(void *steps)
{
	run(steps);
	_exit(0);
}

static void *rest_of_thread(void *steps)
{
	rest_of(steps);
	return NULL;
}

/* Once our parent has ended. */
static int rest_of_orphan(void *steps)
{
	struct timespec nap = { 0, 1000000 };

	while (getppid() == parent_of_orphan)
		nanosleep(&nap, NULL);
	return rest_of(steps);
}

static void *thread_of(void *steps)
{
	run(steps);
	return NULL;
}

static void *older_thread(void *unused)
{
	pthread_barrier_wait(&handover);
	run(older_steps);
	return unused;
}

static void run(char **steps)
{
	pthread_t thread;
	char byte;
	pid_t pid;

	for (; *steps; steps++) {
		char *step = *steps, *word = strchr(step, ':');
		long number = word ? strtol(word + 1, NULL, 0) : 0;

		if (word)
			*word++ = 0;
#define IS(name) (!strcmp(step, name))
		/* questions; the number is the flags */
		if (IS("syscall"))
			answer_and_close(syscall64(SYS_userfaultfd, number, 0, 0, 0));
		else if (IS("syscall-misleading")) /* the other places say user mode only */
			answer_and_close(syscall64(SYS_userfaultfd, number, USERFAULTFD_IOC_NEW, 1, 1));
		else if (IS("int80"))
			answer_and_close(syscall32(USERFAULTFD32, number, 0, 0, 0, 0));
		else if (IS("int80-misleading"))
			answer_and_close(syscall32(USERFAULTFD32, number, USERFAULTFD_IOC_NEW, 1, 1, USERFAULTFD_IOC_NEW));
		else if (IS("device"))
			answer_and_close(syscall64(SYS_ioctl, device(), USERFAULTFD_IOC_NEW, number, 0));
		else if (IS("device-misleading"))
			answer_and_close(syscall64(SYS_ioctl, odd_device(), USERFAULTFD_IOC_NEW, number, 1));
		else if (IS("device-int80"))
			answer_and_close(syscall32(IOCTL32, device(), USERFAULTFD_IOC_NEW, number, 0, 0));
		else if (IS("device-int80-misleading"))
			answer_and_close(syscall32(IOCTL32, odd_device(), USERFAULTFD_IOC_NEW, number, 1, 1));
		else if (IS("flood")) /* by the device: it is no knob that refuses */
			flood(number, device());
		else if (IS("flood-after-kvm")) { /* from the first that is allowed on */
			while (close(open("/dev/kvm", O_RDWR)) || ioctl(device(), USERFAULTFD_IOC_NEW, 0) < 0)
				;
			flood(number, device());
		} else if (IS("flood-syscall"))
			flood(number, -1);
		else if (IS("hold")) /* a userfaultfd */
			answer(opened = syscall64(SYS_userfaultfd, number, 0, 0, 0));
		else if (IS("duplicate"))
			answer(opened = dup(opened));
		else if (IS("loop")) /* until a file exists */
			for (; access(word, F_OK); usleep(10000))
				answer_and_close(syscall64(SYS_userfaultfd, 0, 0, 0, 0));
		else if (IS("others"))
			others();
		/* /dev/kvm */
		else if (IS("open"))
			answer((opened = open(word, O_RDWR)) < 0 ? -errno : opened);
		else if (IS("open-path"))
			answer((opened = open(word, O_PATH)) < 0 ? -errno : opened);
		else if (IS("receive"))
			opened = received(word);
		else if (IS("close"))
			close(opened);
		else if (IS("opens")) {
			while (number--)
				if (close(open("/dev/kvm", O_RDWR)))
					fail(step);
		} else if (IS("generations"))
			generations(number);
		else if (IS("churn"))
			churn();
		else if (IS("deaths"))
			deaths(number);
		else if (IS("child-opens")) /* in our address space, and ends */
			await(clone(open_kvm, new_stack(), CLONE_VM | CLONE_VFORK | SIGCHLD, NULL));
		else if (IS("be-traced"))
			be_traced();
		else if (IS("crowd"))
			crowd(number);
		else if (IS("until-allowed"))
			until_allowed(number);
		/* who we are */
		else if (IS("become"))
			become(number, 0);
		else if (IS("become-with-ptrace"))
			become(number, 1);
		else if (IS("drop-ptrace") && drop_capability(CAP_SYS_PTRACE))
			fail(step);
		else if (IS("name"))
			prctl(PR_SET_NAME, word);
		else if (IS("unshare-user") && unshare(CLONE_NEWUSER))
			fail(step);
		else if (IS("executable"))
			set_executable(word);
		else if (IS("use-existing"))
			use_existing(number);
		else if (IS("wait") && read(0, &byte, 1) < 0)
			fail(step);
		/* who does the rest */
		else if (IS("fork")) {
			if (!(pid = fork()))
				rest_of(steps + 1);
			return await(pid);
		} else if (IS("vfork") || IS("clone-vm")) {
			pid = clone(rest_of, new_stack(), CLONE_VM | SIGCHLD | (IS("vfork") ? CLONE_VFORK : 0),
				    steps + 1);
			return await(pid);
		} else if (IS("orphan") || IS("orphan-vm")) { /* a child, when we have ended */
			parent_of_orphan = getpid();
			if (clone(rest_of_orphan, new_stack(), (IS("orphan-vm") ? CLONE_VM : 0) | SIGCHLD,
				  steps + 1) < 0)
				fail(step);
			_exit(0);
		} else if (IS("subreaper")) { /* a grandchild, which gets us for its parent when its own ends */
			prctl(PR_SET_CHILD_SUBREAPER, 1);
			if (!(pid = fork()))
				rest_of(steps + 1);
			while (wait(NULL) > 0)
				;
			_exit(0);
		} else if (IS("thread")) {
			pthread_create(&thread, NULL, thread_of, steps + 1);
			pthread_join(thread, NULL);
			return;
		} else if (IS("older-thread")) {
			pthread_barrier_init(&handover, NULL, 2);
			pthread_create(&thread, NULL, older_thread, NULL);
		} else if (IS("hand-over")) { /* to the older thread */
			older_steps = steps + 1;
			pthread_barrier_wait(&handover);
			pthread_join(thread, NULL);
			return;
		} else if (IS("leader-leaves")) { /* the thread-group leader exits, a thread goes on */
			pthread_create(&thread, NULL, rest_of_thread, steps + 1);
			syscall(SYS_exit, 0);
		} else if (IS("exec")) {
			steps[0] = "/proc/thread-self/exe"; /* the leader may have left */
			execv(steps[0], steps);
			fail("exec");
		} else if (!IS("drop-ptrace") && !IS("unshare-user") && !IS("wait")) {
			dprintf(2, "actor: what is %s?\n", step);
			_exit(97);
		}
	}
}

int main(int count, char **arguments)
{
	(void)count;
	run(arguments + 1);
	return 0;
}
