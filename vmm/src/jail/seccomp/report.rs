//! Debug builds only: names the call that a thread is stopped for. The process still ends.

use std::cell::Cell;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::jail::error::{Doing, check};
use crate::jail::{JailError, ThreadKind};

const VARIABLE: &str = "CELLA_SECCOMP_REPORT";

static WANTED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static KIND: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

/// Installs the handler if the environment asks for reports. Call it before the environment is cleared.
pub(super) fn prepare() -> Result<(), JailError> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(());
    }
    WANTED.store(true, Ordering::Relaxed);
    // SAFETY: all zeros is a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_refused as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and calls nothing that is not signal-safe.
    check(unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) })
        .map(drop)
        .doing("installing the handler that reports refused system calls")
}

/// Whether the calling thread, of `kind`, shall report.
pub(super) fn is_wanted(kind: ThreadKind) -> bool {
    KIND.set(Some(kind));
    WANTED.load(Ordering::Relaxed)
}

/// `siginfo_t` of a `SIGSYS` as x86-64 and arm64 have it.
#[repr(C)]
struct Refused {
    signal: [libc::c_int; 4],
    address: usize,
    number: libc::c_int,
}

extern "C" fn on_refused(_: libc::c_int, info: *const Refused, _: *const libc::c_void) {
    // SAFETY: the kernel gives a siginfo_t for a handler with SA_SIGINFO.
    let number = unsafe { (*info).number };
    let mut text = [0_u8; 96];
    let mut rest = text.as_mut_slice();
    let _ = writeln!(rest, "seccomp: a {:?} thread called {number}", KIND.get());
    let unused = rest.len();
    let len = text.len().saturating_sub(unused);
    // SAFETY: writes initialised bytes and ends the process; both calls are in every filter.
    unsafe {
        libc::write(2, text.as_ptr().cast(), len);
        libc::_exit(128 + libc::SIGSYS);
    }
}
