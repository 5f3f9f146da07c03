// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What a call costs: measure [-f allow|notify] [-t THREADS] [-w WORKERS] [-r RATE] [-b BATCHES] PATH...
 *
 * For each PATH a line: its name, the least, the mean and the greatest nanoseconds per call of all batches, and the
 * errno's name when the call was refused, else "-". In a VM that counts instructions a nanosecond is one. With
 * WORKERS that many processes do it at once, and the figure is the whole time by the number of calls. With
 * RATE nothing is measured: it is called so many times a second, for ever.
 *
 * Each PATH is measured in a process of its own: who has opened /dev/kvm has done so in that one alone.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW 0xaa00
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define ROOT 0
#define USER 1000

static int refused; /* the errno of the last call that was */
static int device = -1;
static char *page, *source;

static void created(int fd)
{
	if (fd < 0)
		refused = errno;
	else
		close(fd);
}

static void needed(int fd, const char *what)
{
	if (fd < 0)
		err(1, "%s", what);
	close(fd);
}

static void nothing(void)
{
}

static void call(void)
{
	created(syscall(SYS_userfaultfd, O_CLOEXEC));
}

static void call_user_mode_only(void)
{
	created(syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY));
}

static void call_device(void)
{
	created(ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC));
}

static void open_kvm(void)
{
	needed(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
}

static void open_null(void)
{
	needed(open("/dev/null", O_RDWR | O_CLOEXEC), "/dev/null");
}

static void open_tmpfs(void)
{
	needed(open("/run/measure", O_RDONLY | O_CLOEXEC), "/run/measure");
}

static void make_eventfd(void)
{
	needed(eventfd(0, EFD_CLOEXEC), "eventfd");
}

static void make_io_uring(void)
{
	unsigned char parameters[120] = {};

	needed(syscall(SYS_io_uring_setup, 4, parameters), "io_uring_setup");
}

static void getppid_(void)
{
	syscall(SYS_getppid);
}

static void await(pid_t pid)
{
	int status;

	if (pid < 0 || waitpid(pid, &status, 0) != pid || status)
		err(1, "fork");
}

static void fork_exit(void)
{
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	await(pid);
}

static void fork_exec_exit(void)
{
	pid_t pid = fork();

	if (!pid) {
		execl("/run/measure", "measure", NULL);
		_exit(1);
	}
	await(pid);
}

static void *returns(void *nothing)
{
	return nothing;
}

static void create_join(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, returns, NULL) || pthread_join(thread, NULL))
		err(1, "thread");
}

static void *map(size_t size)
{
	void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (place == MAP_FAILED)
		err(1, "mmap");
	return place;
}

static void map_unmap(void)
{
	munmap(map(4096), 4096);
}

static void *server(void *descriptor)
{
	int uffd = (long)descriptor;
	struct uffdio_copy copy = { .dst = (long)page, .src = (long)source, .len = 4096 };
	struct uffd_msg message;

	while (read(uffd, &message, sizeof(message)) == sizeof(message))
		if (ioctl(uffd, UFFDIO_COPY, &copy))
			err(1, "UFFDIO_COPY");
	err(1, "userfaultfd");
}

/* The userfaultfd is made by root: it is the faults that are measured, in every mode. */
static void serve(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	long uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	pthread_t thread;

	page = map(4096);
	source = map(4096);
	source[0] = 42;
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || pthread_create(&thread, NULL, server, (void *)uffd))
		err(1, "userfaultfd");
	device = uffd;
}

static void fault(void)
{
	struct uffdio_register range = { .range = { (long)page, 4096 }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	if (ioctl(device, UFFDIO_REGISTER, &range) || *(volatile char *)page != 42 ||
	    madvise(page, 4096, MADV_DONTNEED) || ioctl(device, UFFDIO_UNREGISTER, &range.range))
		err(1, "fault");
}

static const struct path {
	const char *name;
	void (*body)(void);
	/* Calls in one go: short against the 4,000,000 instructions between two ticks; one where others are woken. */
	int batch;
	int times; /* more batches: for what varies */
	void (*before)(void); /* as root */
	void (*after)(void); /* as who is measured */
	int user;
} paths[] = {
	{ "userfaultfd", call, 200, .user = USER },
	{ "userfaultfd by root", call, 200, .user = ROOT },
	{ "userfaultfd after /dev/kvm", call, 200, .after = open_kvm, .user = USER },
	{ "userfaultfd user-mode-only", call_user_mode_only, 200, .user = USER },
	{ "/dev/userfaultfd", call_device, 200, .user = USER },
	{ "/dev/userfaultfd by root", call_device, 200, .user = ROOT },
	{ "/dev/userfaultfd after /dev/kvm", call_device, 200, .after = open_kvm, .user = USER },
	{ "page fault served", fault, 1, .before = serve, .user = USER },
	{ "getppid", getppid_, 1000, .user = USER },
	{ "eventfd", make_eventfd, 40, .user = USER },
	{ "open tmpfs file", open_tmpfs, 40, .user = USER },
	{ "open /dev/null", open_null, 40, .user = USER },
	{ "open /dev/kvm", open_kvm, 40, .user = USER },
	{ "io_uring_setup", make_io_uring, 1, .times = 10, .user = USER },
	{ "fork, exit", fork_exit, 1, .times = 4, .user = USER },
	{ "fork, exec, exit", fork_exec_exit, 1, .user = USER },
	{ "thread create, join", create_join, 1, .times = 10, .user = USER },
	{ "mmap, munmap", map_unmap, 1, .user = USER },
};

static int batches = 20;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static double batch(void (*body)(void), int calls)
{
	double begin = now();

	for (int i = 0; i < calls; i++)
		body();
	return now() - begin;
}

static double loop(int calls)
{
	double least = batch(nothing, calls);

	for (int i = 0; i < 20; i++) {
		double time = batch(nothing, calls);

		if (time < least)
			least = time;
	}
	return least;
}

static void install(struct sock_filter *code, int length, int flags, int *listener)
{
	struct sock_fprog program = { length, code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		err(1, "PR_SET_NO_NEW_PRIVS");
	*listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
	if (*listener < 0)
		err(1, "seccomp");
}

static void answer(int listener)
{
	struct seccomp_notif request = {};
	struct seccomp_notif_resp response = { .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };

	while (!ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request)) {
		response.id = request.id;
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &request.id) ||
		    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response))
			break;
		memset(&request, 0, sizeof(request));
	}
	_exit(0);
}

/*
 * A list of system calls that may be made, as a container engine's, or a supervisor in another process, with the
 * same table of descriptors, that is asked about userfaultfd.
 */
static void filter(const char *how)
{
	static struct sock_filter code[1200];
	int n = 0, ends[2], listener;

	code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
	code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	if (!strcmp(how, "allow")) {
		for (int nr = 0; nr < 450; nr++) {
			if (nr > 334 && nr < 424)
				continue;
			code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1);
			code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
		}
		code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
		install(code, n, 0, &listener);
		return;
	}
	code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
	code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	if (pipe(ends))
		err(1, "pipe");
	if (!syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, 0)) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (read(ends[0], &listener, sizeof(listener)) == sizeof(listener))
			answer(listener);
		_exit(1);
	}
	install(code, n, SECCOMP_FILTER_FLAG_NEW_LISTENER, &listener);
	if (write(ends[1], &listener, sizeof(listener)) != sizeof(listener))
		err(1, "pipe");
}

static void *sleeps(void *nothing)
{
	for (;;)
		pause();
	return nothing;
}

static void prepare(const struct path *path, const char *how, int threads)
{
	pthread_t thread;

	device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (device < 0)
		err(1, "/dev/userfaultfd");
	if (path->before)
		path->before();
	if (path->user && (setresgid(USER, USER, USER) || setresuid(USER, USER, USER)))
		err(1, "setresuid");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (path->after)
		path->after();
	for (int i = 1; i < threads; i++)
		if (pthread_create(&thread, NULL, sleeps, NULL))
			err(1, "thread");
	if (how)
		filter(how);
	for (int i = 0; i < 3; i++)
		batch(path->body, path->batch);
}

static void measure(const struct path *path, int threads)
{
	/* Where there are many threads a call takes thrice as long. */
	int calls = threads > 16 ? path->batch / 2 : path->batch;
	double least = 1e18, most = 0, sum = 0, empty = loop(calls);
	int number = batches * (path->times ?: 1);

	for (int i = 0; i < number; i++) {
		double each = (batch(path->body, calls) - empty) / calls;

		least = each < least ? each : least;
		most = each > most ? each : most;
		sum += each;
	}
	printf("%s\t%.2f\t%.2f\t%.2f\t%s\n", path->name, least, sum / number, most,
	       refused ? strerrorname_np(refused) : "-");
	fflush(stdout);
}

static void measure_at_once(const struct path *path, int workers)
{
	double begin;
	int status;

	begin = now();
	for (int i = 0; i < workers; i++) {
		if (fork())
			continue;
		if (path->after) /* for this address space, too */
			path->after();
		for (int j = 0; j < batches; j++)
			batch(path->body, path->batch);
		_exit(refused);
	}
	while (wait(&status) > 0)
		if (status)
			errx(1, "a worker failed");
	begin = (now() - begin) / ((double)workers * batches * path->batch);
	printf("%s\t%.2f\t%.2f\t%.2f\t-\n", path->name, begin, begin, begin);
	fflush(stdout);
}

static void repeat(const struct path *path, int rate)
{
	struct timespec pause = { rate == 1, rate == 1 ? 0 : 1000000000 / rate };

	for (;;) {
		nanosleep(&pause, NULL);
		path->body();
	}
}

static const struct path *find(const char *name)
{
	for (size_t i = 0; i < sizeof(paths) / sizeof(*paths); i++)
		if (!strcmp(paths[i].name, name))
			return &paths[i];
	errx(2, "no such path: %s", name);
}

int main(int count, char **arguments)
{
	int option, threads = 1, workers = 0, rate = 0, status;
	const char *how = NULL;

	if (count == 1) /* what an exec measures */
		return 0;
	while ((option = getopt(count, arguments, "f:t:w:r:b:")) != -1) {
		if (option == 'f')
			how = optarg;
		else if (option == 't')
			threads = atoi(optarg);
		else if (option == 'w')
			workers = atoi(optarg);
		else if (option == 'r')
			rate = atoi(optarg);
		else if (option == 'b')
			batches = atoi(optarg);
		else
			return 2;
	}
	for (char **name = arguments + optind; *name; name++) {
		const struct path *path = find(*name);

		fflush(stdout);
		if (!fork()) {
			prepare(path, how, threads);
			if (rate)
				repeat(path, rate);
			else if (workers)
				measure_at_once(path, workers);
			else
				measure(path, threads);
			_exit(0);
		}
		if (wait(&status) < 0 || status)
			errx(1, "%s failed", *name);
	}
	return 0;
}
