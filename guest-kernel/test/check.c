/*
 * Asks a running guest kernel for everything a pod may want of it. Runs as PID 1 (run.sh boots it under QEMU), prints a
 * line for each thing that failed, then "N passed, N failed", and restarts the machine, which ends QEMU.
 *
 * Every check is a system call that does the thing, or the kernel's own list of what it has; no configuration file is
 * read, since what counts is what works.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/aio_abi.h>
#include <linux/bpf.h>
#include <linux/fanotify.h>
#include <linux/filter.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/kcmp.h>
#include <linux/keyctl.h>
#include <linux/membarrier.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nf_tables_compat.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <linux/veth.h>
#include <linux/vm_sockets.h>
#include <linux/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static int passed, failed, verbose;

static void check(int ok, const char *what)
{
	if (ok) {
		passed++;
		if (verbose)
			printf("ok: %s\n", what);
	} else {
		failed++;
		printf("FAILED: %s (%s)\n", what, strerror(errno));
	}
	errno = 0;
}

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t n = write(fd, text, strlen(text));
	close(fd);
	return n == (ssize_t)strlen(text);
}

static int get(const char *path, char *buf, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	size_t len = 0;
	ssize_t n;
	while (len < size - 1 && (n = read(fd, buf + len, size - 1 - len)) > 0)
		len += n;
	buf[len] = 0;
	close(fd);
	return 1;
}

/* Is `word` in `text`, with white space or an end on both sides? */
static int has_word(const char *text, const char *word)
{
	size_t len = strlen(word);
	for (const char *p = text; (p = strstr(p, word)); p += len)
		if ((p == text || strchr(" \t\n", p[-1])) && (!p[len] || strchr(" \t\n", p[len])))
			return 1;
	return 0;
}

/* Runs `f` in a child; true when it returned true. */
static int in_child(int (*f)(void))
{
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0)
		_exit(f() ? 0 : errno ? errno : 255);
	int status;
	waitpid(pid, &status, 0);
	errno = WIFEXITED(status) ? WEXITSTATUS(status) : EFAULT;
	return status == 0;
}

/* --- file systems --------------------------------------------------------------------------------------------- */

static void check_mounts(void)
{
	static const struct { const char *type, *where, *data; } mounts[] = {
		{ "proc", "/proc", NULL },
		{ "sysfs", "/sys", NULL },
		{ "devtmpfs", "/dev", NULL },
		{ "tmpfs", "/tmp", "size=16m,inode64,huge=never" },
		{ "devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620" },
		{ "mqueue", "/dev/mqueue", NULL },
		{ "tmpfs", "/dev/shm", NULL },
		{ "cgroup2", "/sys/fs/cgroup", "nsdelegate,memory_recursiveprot" },
		{ "securityfs", "/sys/kernel/security", NULL },
		{ "bpf", "/sys/fs/bpf", NULL },
		{ "hugetlbfs", "/tmp/huge", "pagesize=2M" },
	};
	char what[100];
	for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
		mkdir(mounts[i].where, 0755);
		int rc = mount(mounts[i].type, mounts[i].where, mounts[i].type, 0, mounts[i].data);
		snprintf(what, sizeof what, "mount %s on %s", mounts[i].type, mounts[i].where);
		check(rc == 0, what);
	}
	static char list[4096];
	static const char *const types[] = { "ext4", "erofs", "overlay", "fuse", "fuseblk", "fusectl", "virtiofs", "pipefs", "ramfs" };
	check(get("/proc/filesystems", list, sizeof list), "/proc/filesystems");
	for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
		snprintf(what, sizeof what, "file system %s", types[i]);
		check(has_word(list, types[i]), what);
	}
}

static int overlay(void)
{
	char text[10];
	mkdir("/tmp/l", 0755), mkdir("/tmp/u", 0755), mkdir("/tmp/w", 0755), mkdir("/tmp/m", 0755);
	close(open("/tmp/l/file", O_CREAT | O_WRONLY, 0644));
	put("/tmp/l/file", "below");
	if (mount("overlay", "/tmp/m", "overlay", 0, "lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w"))
		return 0;
	if (!get("/tmp/m/file", text, sizeof text) || strcmp(text, "below") || !put("/tmp/m/file", "above"))
		return 0;
	return get("/tmp/u/file", text, sizeof text) && !strcmp(text, "above") && get("/tmp/l/file", text, sizeof text) &&
	       !strcmp(text, "below") && !umount("/tmp/m");
}

static int userns_overlay(void)
{
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS) || !put("/proc/self/setgroups", "deny") ||
	    !put("/proc/self/uid_map", "0 0 1") || !put("/proc/self/gid_map", "0 0 1"))
		return 0;
	return !mount("tmpfs", "/tmp", "tmpfs", 0, NULL) && !mkdir("/tmp/l", 0755) && !mkdir("/tmp/u", 0755) &&
	       !mkdir("/tmp/w", 0755) && !mkdir("/tmp/m", 0755) &&
	       !mount("overlay", "/tmp/m", "overlay", 0, "lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w,userxattr");
}

static void check_files(void)
{
	check(overlay(), "overlayfs: copy-up");
	check(in_child(userns_overlay), "overlayfs in a user namespace");
	int fd = open("/tmp/attr", O_CREAT | O_RDWR, 0644);
	check(!fsetxattr(fd, "trusted.x", "1", 1, 0), "tmpfs: trusted extended attribute");
	check(!fsetxattr(fd, "security.capability", "\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 20, 0), "tmpfs: file capability");
	check(!fsetxattr(fd, "user.x", "1", 1, 0), "tmpfs: user extended attribute");
	static const uint8_t acl[] = { 2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 1, 0, 0, 0, 4, 0, 4, 0,
				       255, 255, 255, 255, 16, 0, 6, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255 };
	check(!fsetxattr(fd, "system.posix_acl_access", acl, sizeof acl, 0), "tmpfs: POSIX ACL");
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	check(!fcntl(fd, F_OFD_SETLK, &lock), "open file description lock");
	check(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), "punch a hole");
	struct { struct file_handle h; char data[128]; } handle = { .h.handle_bytes = 128 };
	int id;
	check(!name_to_handle_at(AT_FDCWD, "/tmp/attr", &handle.h, &id, 0), "file handles");
	check(syscall(SYS_openat2, AT_FDCWD, "/tmp/attr", (uint64_t[3]){ O_RDONLY, 0, 0x4 /* no symbolic links */ }, 24) >= 0, "openat2");
	check(open("/tmp", O_TMPFILE | O_RDWR, 0600) >= 0, "O_TMPFILE");
	fd = syscall(SYS_fsopen, "tmpfs", 0);
	check(fd >= 0 && !syscall(SYS_fsconfig, fd, 6, NULL, NULL, 0) && syscall(SYS_fsmount, fd, 0, 0) >= 0, "new mount API");
	int tree = syscall(SYS_open_tree, AT_FDCWD, "/tmp", 0x80001 /* clone, cloexec */);
	uint64_t attr[4] = { MS_RDONLY };
	check(tree >= 0 && !syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, attr, sizeof attr), "mount_setattr");
	int in = inotify_init1(IN_CLOEXEC);
	check(in >= 0 && inotify_add_watch(in, "/tmp", IN_CREATE) >= 0, "inotify");
	int fan = syscall(SYS_fanotify_init, FAN_CLASS_CONTENT, O_RDONLY);
	check(fan >= 0 && !syscall(SYS_fanotify_mark, fan, FAN_MARK_ADD, (uint64_t)FAN_OPEN_PERM, AT_FDCWD, "/tmp/l"), "fanotify with permission events");
	close(fan);
	int ptm = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY), zero = 0, n = -1;
	check(ptm >= 0 && !ioctl(ptm, TIOCSPTLCK, &zero) && !ioctl(ptm, TIOCGPTN, &n) && ioctl(ptm, TIOCGPTPEER, O_RDWR | O_NOCTTY) >= 0, "pseudo terminal");
	check(open("/dev/loop-control", O_RDWR) >= 0 && ioctl(open("/dev/loop-control", O_RDWR), 0x4C82) >= 0, "loop device on demand");
	check(open("/dev/fuse", O_RDWR) >= 0, "/dev/fuse");
	check(swapon("/tmp/attr", 0) < 0 && errno != ENOSYS, "swap");
}

/* --- namespaces and cgroups ------------------------------------------------------------------------------------- */

static int cgroup_into(void)
{
	mkdir("/sys/fs/cgroup/into", 0755);
	int fd = open("/sys/fs/cgroup/into", O_RDONLY | O_DIRECTORY);
	uint64_t args[11] = { 0x200000000ull /* CLONE_INTO_CGROUP */, 0, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, fd };
	pid_t pid = syscall(SYS_clone3, args, sizeof args);
	if (pid == 0) {
		char text[100];
		_exit(!(get("/proc/self/cgroup", text, sizeof text) && !strcmp(text, "0::/into\n")));
	}
	int status;
	return pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
}

static int eat(void)
{
	char text[20];
	snprintf(text, sizeof text, "%d", getpid());
	if (!put("/sys/fs/cgroup/eat/cgroup.procs", text))
		return 0;
	char *p = mmap(NULL, 16 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < 16 << 20; i += 4096)
		p[i] = 1;
	return 1;
}

static int memory_limit(void)
{
	mkdir("/sys/fs/cgroup/eat", 0755);
	if (!put("/sys/fs/cgroup/eat/memory.max", "4194304") || !put("/sys/fs/cgroup/eat/memory.oom.group", "1"))
		return 0;
	pid_t pid = fork();
	if (pid == 0)
		_exit(!eat());
	int status;
	waitpid(pid, &status, 0);
	static char text[300];
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && get("/sys/fs/cgroup/eat/memory.events", text, sizeof text) &&
	       !strstr(text, "oom_kill 0");
}

/* A device filter that forbids everything, on a cgroup of its own: /dev/zero must not open there. */
static int device_filter(void)
{
	struct bpf_insn deny[] = { { .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 }, { .code = BPF_JMP | BPF_EXIT } };
	union bpf_attr load = { .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insns = (uintptr_t)deny, .insn_cnt = 2, .license = (uintptr_t)"" };
	int prog = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof load);
	mkdir("/sys/fs/cgroup/dev", 0755);
	int cgroup = open("/sys/fs/cgroup/dev", O_RDONLY | O_DIRECTORY);
	union bpf_attr attach = { .target_fd = cgroup, .attach_bpf_fd = prog, .attach_type = BPF_CGROUP_DEVICE, .attach_flags = BPF_F_ALLOW_MULTI };
	if (prog < 0 || syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof attach))
		return 0;
	pid_t pid = fork();
	if (pid == 0) {
		put("/sys/fs/cgroup/dev/cgroup.procs", "0");
		int fd = open("/dev/zero", O_RDONLY);
		_exit(!(fd < 0 && errno == EPERM));
	}
	int status;
	waitpid(pid, &status, 0);
	return status == 0;
}

static int freeze(void)
{
	mkdir("/sys/fs/cgroup/ice", 0755);
	char text[200];
	if (!put("/sys/fs/cgroup/ice/cgroup.freeze", "1") || !get("/sys/fs/cgroup/ice/cgroup.events", text, sizeof text) || !strstr(text, "frozen 1"))
		return 0;
	return put("/sys/fs/cgroup/ice/cgroup.freeze", "0") && put("/sys/fs/cgroup/ice/cgroup.kill", "1");
}

static void check_containers(void)
{
	static const struct { int flag; const char *name; } spaces[] = {
		{ CLONE_NEWNS, "mnt" }, { CLONE_NEWUTS, "uts" }, { CLONE_NEWIPC, "ipc" },	{ CLONE_NEWNET, "net" },
		{ CLONE_NEWPID, "pid" }, { CLONE_NEWUSER, "user" }, { CLONE_NEWCGROUP, "cgroup" }, { 0x80, "time" },
	};
	char what[100], path[100];
	for (size_t i = 0; i < sizeof spaces / sizeof *spaces; i++) {
		snprintf(path, sizeof path, "/proc/self/ns/%s", spaces[i].name);
		snprintf(what, sizeof what, "%s namespace", spaces[i].name);
		pid_t pid = fork();
		if (pid == 0)
			_exit(open(path, O_RDONLY) < 0 || unshare(spaces[i].flag));
		int status;
		waitpid(pid, &status, 0);
		check(status == 0, what);
	}
	static char text[1000];
	get("/sys/fs/cgroup/cgroup.controllers", text, sizeof text);
	static const char *const controllers[] = { "cpuset", "cpu", "io", "memory", "hugetlb", "pids", "misc" };
	for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++) {
		snprintf(what, sizeof what, "+%s", controllers[i]);
		check(has_word(text, controllers[i]) && put("/sys/fs/cgroup/cgroup.subtree_control", what), controllers[i]);
	}
	mkdir("/sys/fs/cgroup/c", 0755);
	static const struct { const char *file, *value; } knobs[] = {
		{ "cpu.max", "50000 100000" }, { "cpu.weight", "200" }, { "memory.max", "67108864" },	{ "memory.high", "max" },
		{ "memory.low", "0" },	       { "memory.swap.max", "0" },     { "pids.max", "10" },	{ "cpuset.cpus", "0" },
		{ "cpuset.mems", "0" },	       { "hugetlb.2MB.max", "0" }, { "hugetlb.2MB.rsvd.max", "0" },	{ "io.weight", "200" },
		{ "cpu.idle", "0" },
	};
	for (size_t i = 0; i < sizeof knobs / sizeof *knobs; i++) {
		snprintf(path, sizeof path, "/sys/fs/cgroup/c/%s", knobs[i].file);
		check(put(path, knobs[i].value), path);
	}
	static const char *const stats[] = { "cpu.stat", "memory.stat", "memory.events", "memory.peak", "memory.current", "pids.current",
					     "pids.events", "io.stat", "hugetlb.2MB.current", "misc.max", "cgroup.events", "memory.swap.current" };
	for (size_t i = 0; i < sizeof stats / sizeof *stats; i++) {
		snprintf(path, sizeof path, "/sys/fs/cgroup/c/%s", stats[i]);
		check(get(path, text, sizeof text), path);
	}
	check(cgroup_into(), "clone3 into a cgroup");
	check(memory_limit(), "memory.max kills, memory.events tells");
	check(in_child(device_filter), "BPF device filter");
	check(freeze(), "cgroup freezer and kill");
}

/* --- system calls ---------------------------------------------------------------------------------------------- */

static int seccomp_kills(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 77),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { 4, code };
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &prog) < 0)
		return 0;
	return syscall(SYS_getppid) == -1 && errno == 77;
}

static int deny(long call, int error)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { 4, code };
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &prog) == 0;
}

static int denied(long call, int error)
{
	return syscall(call) == -1 && errno == error;
}

/* What one filter was found to allow (patch 23), the next may deny; each answer is the same again. */
static int seccomp_stacks(void)
{
	int good;
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	good = deny(SYS_getppid, 77);
	for (int twice = 0; twice < 2; twice++)
		good = good && denied(SYS_getppid, 77) && syscall(SYS_getuid) == 0;
	good = good && deny(SYS_getuid, 78);
	for (int twice = 0; twice < 2; twice++)
		good = good && denied(SYS_getppid, 77) && denied(SYS_getuid, 78) && syscall(SYS_getpgrp) >= 0;
	return good && denied(SYS_getppid, 77);
}

static int landlock(void)
{
	int version = syscall(444, NULL, 0, 1);
	uint64_t attr[1] = { 1 };
	int fd = syscall(444, attr, sizeof attr, 0);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return version >= 5 && fd >= 0 && !syscall(446, fd, 0);
}

static int dumps_core(void)
{
	struct stat st;
	if (!put("/proc/sys/kernel/core_pattern", "/tmp/core"))
		return 0;
	pid_t pid = fork();
	if (pid == 0) {
		prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
		syscall(SYS_prlimit64, 0, 4, (uint64_t[2]){ ~0ull, ~0ull }, NULL);
		raise(SIGSEGV);
		_exit(1);
	}
	int status;
	waitpid(pid, &status, 0);
	return WCOREDUMP(status) && !stat("/tmp/core", &st) && st.st_size > 4096 && !unlink("/tmp/core");
}

static int script(void)
{
	int fd = open("/tmp/script", O_CREAT | O_WRONLY, 0755);
	write(fd, "#!/init --true\n", 15);
	close(fd);
	pid_t pid = fork();
	if (pid == 0) {
		execl("/tmp/script", "script", NULL);
		_exit(1);
	}
	int status;
	waitpid(pid, &status, 0);
	return status == 0;
}

/* In a child: where KVM has no hardware virtualization, INT 0x80 is an invalid instruction. */
static int call32(void)
{
	long pid;
	asm volatile("int $0x80" : "=a"(pid) : "a"(20) : "memory", "r8", "r9", "r10", "r11");
	return pid == getpid();
}

static void check_calls(void)
{
	struct epoll_event event = { .events = EPOLLIN };
	int efd = eventfd(1, EFD_CLOEXEC), ep = epoll_create1(0);
	check(!epoll_ctl(ep, EPOLL_CTL_ADD, efd, &event) && epoll_wait(ep, &event, 1, 0) == 1, "epoll and eventfd");
	struct itimerspec soon = { .it_value.tv_nsec = 1000000 };
	uint64_t n = 0;
	int tfd = timerfd_create(CLOCK_MONOTONIC, 0);
	check(!timerfd_settime(tfd, 0, &soon, NULL) && read(tfd, &n, 8) == 8 && n >= 1, "timerfd");
	sigset_t set;
	sigemptyset(&set), sigaddset(&set, SIGUSR1);
	check(signalfd(-1, &set, 0) >= 0, "signalfd");
	struct timespec res, a, b;
	check(!clock_getres(CLOCK_MONOTONIC, &res) && res.tv_nsec == 1, "high-resolution timers");
	clock_gettime(CLOCK_MONOTONIC, &a);
	nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
	clock_gettime(CLOCK_MONOTONIC, &b);
	check((b.tv_sec - a.tv_sec) * 1000000000ll + b.tv_nsec - a.tv_nsec >= 2000000, "nanosleep sleeps");
	timer_t timer;
	check(!timer_create(CLOCK_MONOTONIC, NULL, &timer), "POSIX timer");
	aio_context_t aio = 0;
	check(!syscall(SYS_io_setup, 4, &aio), "AIO");
	static uint32_t params[30];
	check(syscall(SYS_io_uring_setup, 4, params) >= 0, "io_uring");
	check(syscall(SYS_userfaultfd, O_CLOEXEC) >= 0, "userfaultfd");
	int mem = memfd_create("m", MFD_ALLOW_SEALING);
	check(mem >= 0 && !ftruncate(mem, 4096) && !fcntl(mem, F_ADD_SEALS, F_SEAL_SHRINK), "memfd with seals");
	check(syscall(SYS_memfd_secret, 0) >= 0 || errno == ENOSYS, "memfd_secret");
	uint32_t word = 0;
	check(syscall(SYS_futex, &word, 0, 1, NULL) == -1 && errno == EAGAIN, "futex");
	struct { long flags, maxmsg, msgsize, cur, pad[4]; } mq = { .maxmsg = 2, .msgsize = 8 };
	check(syscall(SYS_mq_open, "q", O_CREAT | O_RDWR, 0600, &mq) >= 0, "POSIX message queue");
	check(shmget(IPC_PRIVATE, 4096, 0600) >= 0 && semget(IPC_PRIVATE, 1, 0600) >= 0 && msgget(IPC_PRIVATE, 0600) >= 0, "System V IPC");
	check(syscall(SYS_add_key, "user", "k", "v", 1, KEY_SPEC_PROCESS_KEYRING) > 0, "keys");
	check(in_child(seccomp_kills), "seccomp filter with listener");
	check(in_child(seccomp_stacks), "seccomp filters one on the other");
	check(in_child(landlock), "landlock");
	check(dumps_core(), "core dump");
	check(script(), "script with an interpreter");
	check(syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, 0, 0) == 0, "kcmp");
	char x = 1, y = 0;
	struct iovec from = { &x, 1 }, to = { &y, 1 };
	check(process_vm_readv(getpid(), &to, 1, &from, 1, 0) == 1 && y == 1, "process_vm_readv");
	check(syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0) > 0, "membarrier");
	int pidfd = syscall(SYS_pidfd_open, getpid(), 0);
	check(pidfd >= 0 && !syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0), "pidfd");
	check(!prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096, "a"), "names of anonymous memory");
	check(in_child(call32), "32-bit system call");
	check(syscall(SYS_ioprio_set, 1, 0, 4 << 0 | 2 << 13) == 0, "I/O priority");
	check(sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){ 1 }) == 0 && sched_setscheduler(0, SCHED_OTHER, &(struct sched_param){ 0 }) == 0, "real-time scheduling");
	uint64_t perf[16] = { (uint64_t)128 << 32 | 1 /* software */, 0 /* cpu clock */ };
	check(syscall(SYS_perf_event_open, perf, 0, -1, -1, 0) >= 0, "perf event");
	check(syscall(SYS_getrandom, &n, sizeof n, 0) == sizeof n, "getrandom");
}

/* --- network ------------------------------------------------------------------------------------------------------ */

struct request {
	struct nlmsghdr head;
	char body[1000];
};

static void *attr_put(struct request *r, int type, const void *data, size_t len)
{
	struct nlattr *a = (void *)r + NLMSG_ALIGN(r->head.nlmsg_len);
	a->nla_type = type, a->nla_len = NLA_HDRLEN + len;
	if (data)
		memcpy((char *)a + NLA_HDRLEN, data, len);
	r->head.nlmsg_len = NLMSG_ALIGN(r->head.nlmsg_len) + NLA_ALIGN(a->nla_len);
	return a;
}

static void attr_end(struct request *r, struct nlattr *a)
{
	a->nla_len = (char *)r + r->head.nlmsg_len - (char *)a;
}

/* Sends `len` bytes; 0 when the kernel acknowledged, or its error. */
static int netlink(int proto, const void *data, size_t len)
{
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, proto);
	if (fd < 0)
		return errno;
	int error = EIO;
	if (send(fd, data, len, 0) == (ssize_t)len) {
		static char reply[8192];
		ssize_t n = recv(fd, reply, sizeof reply, 0);
		struct nlmsghdr *h = (void *)reply;
		if (n > 0)
			error = h->nlmsg_type == NLMSG_ERROR ? -*(int *)NLMSG_DATA(h) : 0;
	}
	close(fd);
	return errno = error;
}

static int index_of(const char *name)
{
	struct ifreq r = { 0 };
	strcpy(r.ifr_name, name);
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int rc = ioctl(fd, SIOCGIFINDEX, &r);
	close(fd);
	return rc ? 0 : r.ifr_ifindex;
}

static int link_add(const char *kind, const char *name, const char *parent)
{
	struct request r = { .head = { .nlmsg_len = NLMSG_LENGTH(sizeof(struct ifinfomsg)), .nlmsg_type = RTM_NEWLINK,
				       .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL } };
	attr_put(&r, IFLA_IFNAME, name, strlen(name) + 1);
	if (parent) {
		int index = index_of(parent);
		attr_put(&r, IFLA_LINK, &index, 4);
	}
	struct nlattr *info = attr_put(&r, IFLA_LINKINFO, NULL, 0);
	attr_put(&r, IFLA_INFO_KIND, kind, strlen(kind) + 1);
	attr_end(&r, info);
	return !netlink(NETLINK_ROUTE, &r, r.head.nlmsg_len);
}

static size_t batch_part(char *at, int type, int family, int res)
{
	struct nlmsghdr *h = (void *)at;
	*h = (struct nlmsghdr){ .nlmsg_len = NLMSG_LENGTH(sizeof(struct nfgenmsg)), .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST };
	struct nfgenmsg *g = NLMSG_DATA(h);
	*g = (struct nfgenmsg){ .nfgen_family = family, .res_id = __builtin_bswap16(res) };
	return h->nlmsg_len;
}
static int nft_table(int family)
{
	static char batch[2000];
	size_t len = batch_part(batch, NFNL_MSG_BATCH_BEGIN, 0, NFNL_SUBSYS_NFTABLES);
	struct request *r = (void *)(batch + len);
	batch_part(batch + len, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE, family, 0);
	r->head.nlmsg_flags |= NLM_F_ACK | NLM_F_CREATE;
	attr_put(r, NFTA_TABLE_NAME, "t", 2);
	len += r->head.nlmsg_len;
	len += batch_part(batch + len, NFNL_MSG_BATCH_END, 0, NFNL_SUBSYS_NFTABLES);
	return !netlink(NETLINK_NETFILTER, batch, len);
}

/* Does the kernel have this iptables match (target = 0) or target (1), at least in revision `rev`? */
static int xt(int family, const char *name, int rev, int target)
{
	struct request r;
	memset(&r, 0, sizeof r);
	batch_part((char *)&r, NFNL_SUBSYS_NFT_COMPAT << 8 | NFNL_MSG_COMPAT_GET, family, 0);
	r.head.nlmsg_flags |= NLM_F_ACK;
	uint32_t be_rev = __builtin_bswap32(rev), be_target = __builtin_bswap32(target);
	attr_put(&r, NFTA_COMPAT_NAME, name, strlen(name) + 1);
	attr_put(&r, NFTA_COMPAT_REV, &be_rev, 4);
	attr_put(&r, NFTA_COMPAT_TYPE, &be_target, 4);
	return !netlink(NETLINK_NETFILTER, &r, r.head.nlmsg_len);
}

static int legacy_table(int v6, const char *table)
{
	int fd = socket(v6 ? AF_INET6 : AF_INET, SOCK_RAW, 255);
	struct ipt_getinfo info = { 0 };
	strcpy(info.name, table);
	socklen_t len = sizeof info;
	int rc = getsockopt(fd, v6 ? 41 : 0, IPT_SO_GET_INFO, &info, &len);
	close(fd);
	return rc == 0;
}

static void check_network(void)
{
	static const struct { int family, type, proto; const char *name; } sockets[] = {
		{ AF_INET, SOCK_STREAM, 0, "TCP" }, { AF_INET, SOCK_DGRAM, 0, "UDP" }, { AF_INET, SOCK_RAW, 1, "raw IPv4" },
		{ AF_INET6, SOCK_STREAM, 0, "TCP over IPv6" }, { AF_UNIX, SOCK_SEQPACKET, 0, "UNIX" }, { AF_PACKET, SOCK_RAW, 0, "packet" },
		{ AF_VSOCK, SOCK_STREAM, 0, "vsock" }, { AF_NETLINK, SOCK_RAW, NETLINK_ROUTE, "rtnetlink" },
		{ AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER, "nfnetlink" }, { AF_NETLINK, SOCK_RAW, NETLINK_GENERIC, "generic netlink" },
		{ AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG, "socket diagnosis" }, { AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT, "uevents" },
	};
	char what[100];
	for (size_t i = 0; i < sizeof sockets / sizeof *sockets; i++) {
		snprintf(what, sizeof what, "%s socket", sockets[i].name);
		int fd = socket(sockets[i].family, sockets[i].type, sockets[i].proto);
		check(fd >= 0, what);
		close(fd);
	}
	check(link_add("dummy", "du0", NULL), "dummy");
	check(link_add("bridge", "br0", NULL), "bridge");
	check(link_add("veth", "ve0", NULL), "veth");
	check(link_add("macvlan", "mv0", "du0"), "macvlan");
	check(link_add("dummy", "du1", NULL) && link_add("ipvlan", "iv0", "du1"), "ipvlan");
	mkdir("/dev/net", 0755);
	int tun = open("/dev/net/tun", O_RDWR);
	struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	check(tun >= 0 && !ioctl(tun, TUNSETIFF, &ifr), "tun");

	struct request rule = { .head = { .nlmsg_len = NLMSG_LENGTH(12), .nlmsg_type = RTM_NEWRULE, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE } };
	struct rtmsg *rt = NLMSG_DATA(&rule.head);
	rt->rtm_family = AF_INET, rt->rtm_table = 100, rt->rtm_type = RTN_UNICAST;
	check(!netlink(NETLINK_ROUTE, &rule, rule.head.nlmsg_len), "IPv4 routing rule");
	rt->rtm_family = AF_INET6;
	check(!netlink(NETLINK_ROUTE, &rule, rule.head.nlmsg_len), "IPv6 routing rule");

	static const struct { int family; const char *name; } families[] = { { NFPROTO_IPV4, "ip" }, { NFPROTO_IPV6, "ip6" }, { NFPROTO_INET, "inet" }, { NFPROTO_NETDEV, "netdev" } };
	for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
		snprintf(what, sizeof what, "nf_tables family %s", families[i].name);
		check(nft_table(families[i].family), what);
	}
	static const struct { const char *name; int rev, target; } exts[] = {
		{ "tcp", 0, 0 },	{ "udp", 0, 0 },       { "conntrack", 3, 0 }, { "owner", 1, 0 },    { "comment", 0, 0 },
		{ "multiport", 1, 0 }, { "mark", 1, 0 },	{ "addrtype", 1, 0 },  { "statistic", 0, 0 }, { "socket", 1, 0 },
		{ "state", 0, 0 },	{ "limit", 0, 0 },     { "hashlimit", 3, 0 }, { "iprange", 1, 0 },   { "recent", 1, 0 },
		{ "connmark", 1, 0 },	{ "pkttype", 0, 0 },   { "string", 1, 0 },    { "REDIRECT", 0, 1 },  { "MASQUERADE", 0, 1 },
		{ "DNAT", 0, 1 },	{ "SNAT", 0, 1 },      { "REJECT", 0, 1 },    { "LOG", 0, 1 },	     { "TPROXY", 1, 1 },
		{ "MARK", 2, 1 },	{ "CONNMARK", 1, 1 },  { "CT", 2, 1 },	      { "NFLOG", 0, 1 },     { "TCPMSS", 0, 1 },
	};
	for (size_t i = 0; i < sizeof exts / sizeof *exts; i++) {
		snprintf(what, sizeof what, "iptables %s", exts[i].name);
		check(xt(AF_INET, exts[i].name, exts[i].rev, exts[i].target), what);
	}
	static const char *const tables[] = { "filter", "nat", "mangle", "raw" };
	for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
		snprintf(what, sizeof what, "iptables-legacy table %s", tables[i]);
		check(legacy_table(0, tables[i]), what);
		snprintf(what, sizeof what, "ip6tables-legacy table %s", tables[i]);
		check(legacy_table(1, tables[i]), what);
	}
}

/* --- what is under /proc and /sys ------------------------------------------------------------------------------- */

static void check_tree(void)
{
	static const char *const paths[] = {
		"/proc/self/io", "/proc/self/pagemap", "/proc/self/smaps_rollup", "/proc/self/task/1/children", "/proc/self/setgroups",
		"/proc/self/oom_score_adj", "/proc/self/timens_offsets", "/proc/self/cpuset", "/proc/keys", "/proc/sysvipc/shm", "/proc/meminfo",
		"/proc/swaps", "/proc/net/nf_conntrack", "/proc/net/if_inet6", "/proc/net/dev",
		"/proc/sys/kernel/shmmax", "/proc/sys/kernel/msgmax", "/proc/sys/kernel/sem", "/proc/sys/fs/mqueue/msg_max", "/proc/sys/kernel/core_pattern",
		"/proc/sys/user/max_user_namespaces", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/ip_local_port_range", "/proc/sys/net/ipv4/tcp_syncookies",
		"/proc/sys/net/ipv4/ping_group_range", "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/core/somaxconn",
		"/proc/sys/net/ipv6/conf/all/disable_ipv6", "/proc/sys/net/ipv6/conf/all/forwarding", "/proc/sys/net/netfilter/nf_conntrack_max",
		"/proc/sys/net/bridge/bridge-nf-call-iptables", "/proc/sys/vm/overcommit_memory", "/proc/sys/vm/max_map_count", "/proc/sys/vm/drop_caches",
		"/proc/sys/vm/compact_memory", "/proc/sys/kernel/unprivileged_bpf_disabled", "/proc/sys/kernel/keys/maxkeys",
		"/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
		"/sys/devices/system/memory/auto_online_blocks", "/sys/devices/system/memory/block_size_bytes", "/sys/devices/system/cpu/online",
		"/sys/devices/system/cpu/vulnerabilities/spectre_v2", "/sys/class/net/lo/address", "/sys/class/misc/tun", "/sys/class/misc/loop-control",
		"/sys/kernel/security/lsm", "/dev/null", "/dev/kmsg", "/dev/net/tun",
		"/sys/bus/virtio/drivers/virtio_blk", "/sys/bus/virtio/drivers/virtio_net", "/sys/bus/virtio/drivers/virtio_rng",
		"/sys/bus/virtio/drivers/virtio_balloon", "/sys/bus/virtio/drivers/virtio_mem", "/sys/bus/virtio/drivers/virtio_pmem",
		"/sys/bus/virtio/drivers/virtiofs", "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport",
	};
	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
		check(access(paths[i], F_OK) == 0, paths[i]);
	char text[400];
	check(get("/sys/kernel/security/lsm", text, sizeof text) && strstr(text, "landlock"), "landlock is active");
	get("/sys/devices/system/clocksource/clocksource0/current_clocksource", text, sizeof text);
	printf("clock source: %s", text);
	get("/sys/devices/system/cpu/online", text, sizeof text);
	printf("processors: %s", text);
	if (text[1] == '-') {
		check(put("/sys/devices/system/cpu/cpu1/online", "0") && put("/sys/devices/system/cpu/cpu1/online", "1"), "processor 1 off and on");
		cpu_set_t one;
		CPU_ZERO(&one);
		CPU_SET(1, &one);
		check(!sched_setaffinity(0, sizeof one, &one) && sched_getcpu() == 1, "run on processor 1");
	}
}

/* --- devices that run.sh attaches ---------------------------------------------------------------------------------- */

static void check_devices(void)
{
	char text[100];
	if (access("/dev/vda", F_OK) == 0) {
		mkdir("/tmp/disk", 0755);
		check(!mount("/dev/vda", "/tmp/disk", "ext4", 0, NULL), "ext4 on virtio-blk");
		int fd = open("/tmp/disk/f", O_CREAT | O_RDWR, 0644);
		check(fd >= 0 && write(fd, "hello", 5) == 5 && !fsync(fd), "write to it");
	}
	if (access("/dev/hwrng", F_OK) == 0) {
		int fd = open("/dev/hwrng", O_RDONLY);
		check(read(fd, text, 16) == 16, "virtio-rng");
	}
}

/* --- vector state across switches ----------------------------------------------------------------------------------- */

#define VECTOR __attribute__((target("avx"), noinline))
static VECTOR int keeps_vectors(int seed)
{
	__m256i v = _mm256_set1_epi32(seed);
	for (int i = 0; i < 50; i++) {
		asm volatile("vmovdqa %0, %%ymm7" ::"m"(v) : "memory");
		long n = SYS_sched_yield;
		asm volatile("syscall" : "+a"(n) : : "rcx", "r11", "memory");
		int out[8] __attribute__((aligned(32)));
		asm volatile("vmovdqa %%ymm7, %0" : "=m"(out));
		for (int j = 0; j < 8; j++)
			if (out[j] != seed)
				return 0;
	}
	return 1;
}

static void check_vectors(void)
{
	if (!__builtin_cpu_supports("avx"))
		return;
	pid_t pids[3];
	int ok = 1, status;
	for (int i = 0; i < 3; i++)
		if ((pids[i] = fork()) == 0)
			_exit(!keeps_vectors(i + 0x1111));
	for (int i = 0; i < 3; i++)
		ok &= waitpid(pids[i], &status, 0) == pids[i] && status == 0;
	check(ok, "vector registers across switches");
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "--true"))
		return 0;
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int i = 1; i < argc; i++) /* the kernel hands words it does not know to init */
		verbose |= !strcmp(argv[i], "verbose");
	check_mounts();
	check_files();
	check_containers();
	check_calls();
	check_network();
	check_tree();
	check_devices();
	check_vectors();
	printf("%d passed, %d failed\n", passed, failed);
	fflush(stdout);
	sync();
	reboot(RB_AUTOBOOT);
	return 1;
}
