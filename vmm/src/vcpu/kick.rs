//! How a vCPU's thread is brought out of `KVM_RUN`: a real-time signal.
//!
//! A signal alone could arrive just before the thread enters KVM, and be missed. So its handler sets
//! `immediate_exit` in the thread's own `kvm_run`: wherever the thread is, its next (or current) `KVM_RUN`
//! completes the exit before it and returns `EINTR`. The thread clears the flag, then looks for commands.

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;

use kvm_ioctls::VcpuFd;
use libc::c_int;
use vmm_sys_util::errno;
use vmm_sys_util::signal;

thread_local! {
    /// `immediate_exit` of this thread's vCPU, or null. Constant and without destructor: a signal handler may
    /// use it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: a `Kickable` of this very thread has set the pointer, and clears it before the vCPU is dropped or leaves.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the handler, once for the process.
///
/// # Errors
/// `sigaction` failed.
pub fn install_handler() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| signal::register_signal_handler(kick_signal(), on_kick))
}

/// A vCPU in the thread that runs it, reachable by [`Target::kick`].
pub struct Kickable {
    // Dropped before the vCPU, whose memory it is about.
    _bound: Bound,
    vcpu: VcpuFd,
}

/// The calling thread's pointer is set.
struct Bound;

impl Kickable {
    /// Binds `vcpu` to the calling thread, which must be the only one of its kind and lets the signal through
    /// from here on.
    ///
    /// # Errors
    /// The signal's mask could not be changed.
    pub fn bind(mut vcpu: VcpuFd) -> Result<Self, signal::Error> {
        let flag = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.set(flag);
        // From here on, so that the pointer never outlives the mapping.
        let kickable = Self {
            _bound: Bound,
            vcpu,
        };
        signal::unblock_signal(kick_signal())?;
        Ok(kickable)
    }

    /// The vCPU.
    pub fn vcpu(&mut self) -> &mut VcpuFd {
        &mut self.vcpu
    }

    /// Gives the vCPU back: kicks of this thread do nothing any more.
    pub fn release(self) -> VcpuFd {
        self.vcpu
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Not `set`: at the end of a panicking thread the variable may be gone already.
        let _ = IMMEDIATE_EXIT.try_with(|flag| flag.set(ptr::null_mut()));
    }
}

/// A thread that runs a vCPU, as others see it.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl Target {
    /// The calling thread.
    pub fn current() -> Self {
        // SAFETY: no arguments, cannot fail.
        let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
        Self { process, thread }
    }

    /// Brings the thread out of `KVM_RUN`. Does nothing if the thread has ended.
    pub fn kick(self) {
        // SAFETY: plain numbers. A thread of ours that got the same id later would find no vCPU in its handler,
        // or leave KVM_RUN once for nothing.
        let _ =
            unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, kick_signal()) };
    }
}
