//! The system calls that a container may make.
//!
//! The same policy as docker's default: everything that programs use in a container without special
//! capabilities is allowed, the rest fails with EPERM. Left out are calls that manage the machine
//! (modules, reboot, swap, clocks, kexec, quotas, accounting), mounts and namespaces, keys, tracing of
//! the kernel (bpf, perf), handles to files (open_by_handle_at), and io_uring, whose operations no
//! filter sees.

use serde_json::{Value, json};

/// Allowed with any arguments. The families are parted by empty lines; a name that the guest's kernel
/// or libseccomp does not know is passed over by the agent.
const ALLOWED: &str = "
    accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
    recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketpair

    access alarm arch_prctl brk capget capset chdir chmod chown chown32 close close_range
    copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64 fallocate fchdir
    fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr
    flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64
    futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr link linkat listxattr listxattrat
    llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat
    name_to_handle_at newfstatat open openat openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev
    pwritev2 read readahead readlink readlinkat readv removexattr removexattrat rename renameat
    renameat2 rmdir sendfile sendfile64 setxattr setxattrat splice stat stat64 statfs statfs64 statx
    symlink symlinkat sync sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat utime
    utimensat utimensat_time64 utimes vmsplice write writev

    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
    epoll_wait_old eventfd eventfd2 io_cancel io_destroy io_getevents io_pgetevents
    io_pgetevents_time64 io_setup io_submit _newselect poll ppoll ppoll_time64 pselect6
    pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64
    timerfd_settime timerfd_settime64

    clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
    clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete
    timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 times

    execve execveat exit exit_group fork getpgid getpgrp getpid getppid getpriority getrandom
    getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid getcpu getegid
    getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getuid getuid32 ioprio_get
    ioprio_set kill pause pidfd_open pidfd_send_signal prctl prlimit64 process_mrelease
    process_vm_readv process_vm_writev ptrace restart_syscall rseq setfsgid setfsgid32 setfsuid
    setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setpriority setregid setregid32 setresgid
    setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32
    set_robust_list get_robust_list set_thread_area get_thread_area set_tid_address sysinfo tgkill
    tkill ugetrlimit uname vfork wait4 waitid waitpid chroot

    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaction sigaltstack sigpending
    sigprocmask sigreturn signal sigsuspend

    sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min
    sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield

    cachestat get_mempolicy madvise map_shadow_stack membarrier memfd_create memfd_secret mincore
    mlock mlock2 mlockall mmap mmap2 modify_ldt mprotect mremap mseal msync munlock munlockall munmap
    pkey_alloc pkey_free pkey_mprotect remap_file_pages

    futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake ipc mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl
    msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget

    landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp statmount listmount
    lsm_get_self_attr lsm_list_modules lsm_set_self_attr uretprobe
";

/// Flags of clone(2) that make namespaces: newns, newcgroup, newuts, newipc, newuser, newpid, newnet.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// The address family of the channel to the host, which is the agent's alone.
const AF_VSOCK: u64 = 40;
/// ADDR_NO_RANDOMIZE aside, the personalities that docker allows: Linux, BSD, Linux32 in two forms, and
/// the question which one it is.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// The default profile, as the `linux.seccomp` of a runtime specification.
pub(super) fn profile() -> Value {
    let allowed: Vec<&str> = ALLOWED.split_whitespace().collect();
    let mut rules = vec![
        json!({ "names": allowed, "action": "SCMP_ACT_ALLOW" }),
        json!({
            "names": ["clone"], "action": "SCMP_ACT_ALLOW",
            "args": [{
                "index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ",
            }],
        }),
        // Its flags are in memory, where no filter can see them: libraries take ENOSYS as the sign to
        // use clone instead.
        json!({ "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }),
        // Its arguments are in memory as well (32-bit programs); without it, they use socket itself.
        json!({ "names": ["socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS }),
        json!({
            "names": ["socket"], "action": "SCMP_ACT_ALLOW",
            "args": [{ "index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE" }],
        }),
    ];
    rules.extend(PERSONALITIES.iter().map(|personality| {
        json!({
            "names": ["personality"], "action": "SCMP_ACT_ALLOW",
            "args": [{ "index": 0, "value": personality, "op": "SCMP_CMP_EQ" }],
        })
    }));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::EPERM,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    })
}
