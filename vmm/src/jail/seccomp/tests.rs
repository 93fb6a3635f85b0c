use std::collections::BTreeSet;
use std::fmt::Write;

use super::*;

const KINDS: [ThreadKind; 7] = [
    ThreadKind::Main,
    ThreadKind::Vcpu,
    ThreadKind::Block,
    ThreadKind::Net,
    ThreadKind::Fs,
    ThreadKind::VhostUserMain,
    ThreadKind::VhostUserFs,
];

fn render(kind: ThreadKind) -> String {
    let mut text = format!("{kind:?}\n");
    for call in tables::of(kind) {
        let name = call.name.trim_start_matches("SYS_");
        let checks: Vec<_> = call.checks.iter().map(|check| check.text).collect();
        let checks = match checks.is_empty() {
            true => String::new(),
            false => format!(" [{}]", checks.join(" | ")),
        };
        writeln!(text, "    {name}{checks}: {}", call.why).unwrap();
    }
    text
}

/// What a filter allows is a matter for review: an addition must show in `filters.txt`.
#[test]
fn the_filters_are_those_that_were_reviewed() {
    let now = KINDS.map(render).join("\n");
    if std::env::var_os("CELLA_WRITE_FILTERS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/jail/seccomp/filters.txt");
        std::fs::write(path, &now).unwrap();
    }
    assert_eq!(
        now,
        include_str!("filters.txt"),
        "run the test with CELLA_WRITE_FILTERS=1 and review the difference of filters.txt"
    );
}

#[test]
fn no_call_is_in_a_filter_twice() {
    for kind in KINDS {
        let mut seen = BTreeSet::new();
        for call in tables::of(kind) {
            assert!(seen.insert(call.number), "{kind:?}: {}", call.name);
        }
    }
}

/// Calls that make a broken-out guest's life easier, whatever the reason would be.
#[test]
fn no_filter_has_a_call_that_leaves_the_jail() {
    let never = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_kill,
        libc::SYS_bpf,
        libc::SYS_io_uring_setup,
        libc::SYS_userfaultfd,
        libc::SYS_open_by_handle_at,
        libc::SYS_keyctl,
        libc::SYS_prctl,
        libc::SYS_seccomp,
        libc::SYS_init_module,
    ];
    for kind in KINDS {
        for call in tables::of(kind) {
            assert!(!never.contains(&call.number), "{kind:?}: {}", call.name);
        }
    }
}

#[test]
fn every_filter_compiles_and_is_small() {
    for kind in KINDS {
        let program = program(kind, SeccompAction::KillProcess).unwrap();
        // The kernel's limit is 4096 instructions; each costs time on every call that is not cached as allowed.
        println!("{kind:?}: {} instructions", program.len());
        assert!(program.len() < 400, "{kind:?}: {}", program.len());
    }
}

#[test]
fn requests_have_the_numbers_of_the_kernel() {
    let request = |text: &str| {
        let ioctl = tables::of(ThreadKind::Vcpu)
            .find(|call| call.number == libc::SYS_ioctl)
            .unwrap();
        let check = ioctl.checks.iter().find(|check| check.text.ends_with(text));
        check.unwrap().value
    };
    assert_eq!(request(" KVM_RUN"), 0xae80);
    assert_eq!(request(" KVM_GET_REGS"), 0x8090_ae81);
    assert_eq!(request(" KVM_SET_SREGS"), 0x4138_ae84);
    assert_eq!(request(" KVM_SET_VCPU_EVENTS"), 0x4040_aea0);
    assert_eq!(request(" KVM_GET_XSAVE"), 0x9000_aea4);
}
