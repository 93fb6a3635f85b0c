use proptest::prelude::*;

use super::*;

/// What libseccomp makes of all the rules, one by one.
fn by_libseccomp_alone(spec: &LinuxSeccomp) -> Result<Vec<libc::sock_filter>> {
    let default = action(spec.default_action(), spec.default_errno_ret())?;
    let Rules { plain, others } = Rules::new(spec, default, true)?;
    let plain = plain
        .into_iter()
        .map(|(name, action)| (name, action, &[][..]));
    let all = Rules {
        plain: Vec::new(),
        others: plain.chain(others).collect(),
    };
    let program = all.conditional(default, &architectures(spec)?)?;
    Ok(match default {
        ScmpAction::Errno(errno) if errno != libc::ENOSYS => with_enosys_stub(program),
        _ => program,
    })
}

/// Panics unless the filter says of every system call what libseccomp's own would say. The lengths of both.
fn compare(spec: &LinuxSeccomp) -> (usize, usize) {
    const X32: u32 = 0x4000_0000;
    let (ours, theirs) = match (SeccompPlan::new(spec), by_libseccomp_alone(spec)) {
        (Ok(ours), Ok(theirs)) => (ours.program, theirs),
        // Rules that contradict each other by way of `ipc` and `socketcall`.
        (Err(_), Err(_)) => return (0, 0),
        (ours, theirs) => panic!("{ours:?}, but {}", theirs.is_ok()),
    };
    let numbers = (0..NUMBER_LIMIT as u32)
        .chain(X32..X32 + 700)
        .chain([X32 - 1, u32::MAX]);
    for number in numbers {
        for arch in [AUDIT_ARCH_X86_64, AUDIT_ARCH_I386, 0xc000_00b7] {
            for argument in [0, 2, 8, 40, 0x11, 0x1000_0000, u64::MAX] {
                let args = [argument; 6];
                let [ours, theirs] =
                    [&ours, &theirs].map(|program| run(program, number, arch, args));
                assert_eq!(ours, theirs, "{number:#x} of {arch:#x} with {argument:#x}");
            }
        }
    }
    (ours.len(), theirs.len())
}

/// Names of every architecture's system calls.
fn names() -> Vec<String> {
    let mut names: Vec<String> = [ScmpArch::X8664, ScmpArch::X86]
        .into_iter()
        .flat_map(|arch| (0..NUMBER_LIMIT).map(move |number| (arch, number)))
        .filter_map(|(arch, number)| {
            ScmpSyscall::from_raw_syscall(number)
                .get_name_by_arch(arch)
                .ok()
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

fn plan(json: &str) -> Result<SeccompPlan> {
    SeccompPlan::new(&serde_json::from_str(json).unwrap())
}

/// Runs a seccomp program (loads, compares, jumps, masks and returns) on a system call.
fn run(program: &[libc::sock_filter], nr: u32, arch: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(nr.to_ne_bytes());
    data.extend(arch.to_ne_bytes());
    data.extend([0u8; 8]);
    for arg in args {
        data.extend(arg.to_ne_bytes());
    }
    let (mut pc, mut a) = (0usize, 0u32);
    let mut scratch = [0u32; 16];
    let mut x = 0u32;
    loop {
        let i = program[pc];
        pc += 1;
        let mut jump = |taken: bool| pc += usize::from(if taken { i.jt } else { i.jf });
        match i.code {
            0x20 => {
                let at = i.k as usize;
                a = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
            }
            0x15 => jump(a == i.k),
            0x25 => jump(a > i.k),
            0x35 => jump(a >= i.k),
            0x45 => jump(a & i.k != 0),
            0x05 => pc += i.k as usize,
            0x54 => a &= i.k,
            0x02 => scratch[i.k as usize] = a,
            0x60 => a = scratch[i.k as usize],
            0x07 => x = a,
            0x87 => a = x,
            0x06 => return i.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;

#[test]
fn rules_conditions_and_the_default() {
    let plan = plan(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
        "syscalls":[{"names":["read","no_such_call"],"action":"SCMP_ACT_ALLOW"},
        {"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":13},
        {"names":["personality"],"action":"SCMP_ACT_ALLOW",
         "args":[{"index":0,"value":8,"op":"SCMP_CMP_EQ"},{"index":0,"value":0,"op":"SCMP_CMP_EQ"}]}]}"#,
    )
    .unwrap();
    let of = |nr: i64, args| run(&plan.program, nr as u32, AUDIT_ARCH, args);
    assert_eq!(of(libc::SYS_read, [0; 6]), ALLOW);
    assert_eq!(of(libc::SYS_mkdir, [0; 6]), ERRNO | 13);
    assert_eq!(of(libc::SYS_write, [0; 6]), ERRNO | 1);
    assert_eq!(of(libc::SYS_personality, [8, 0, 0, 0, 0, 0]), ALLOW);
    assert_eq!(of(libc::SYS_personality, [0; 6]), ALLOW);
    assert_eq!(of(libc::SYS_personality, [4, 0, 0, 0, 0, 0]), ERRNO | 1);
    assert_eq!(
        of(590, [0; 6]),
        ERRNO | 38,
        "a call nobody knows yet is ENOSYS"
    );
    // i386's read is number 3.
    assert_eq!(run(&plan.program, 3, 0x4000_0003, [0; 6]), ALLOW);
}

#[test]
fn masks_compare_what_remains() {
    let plan = plan(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["clone"],"action":"SCMP_ACT_ERRNO",
        "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    )
    .unwrap();
    let of = |flags| {
        run(
            &plan.program,
            libc::SYS_clone as u32,
            AUDIT_ARCH,
            [flags, 0, 0, 0, 0, 0],
        )
    };
    assert_eq!(of(0x11), ERRNO | 1);
    assert_eq!(of(0x1000_0000), ALLOW);
}

#[test]
fn notifications_are_refused() {
    let error = plan(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
    )
    .unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(plan(r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#).is_err());
}

/// As the host's default profile: most are allowed, some by their arguments, some refused in another way.
#[test]
fn a_profile_of_hundreds_of_rules_is_short_and_means_the_same() {
    let allowed: Vec<String> = names()
        .into_iter()
        .filter(|name| {
            ![
                "clone",
                "clone3",
                "socket",
                "socketcall",
                "personality",
                "mount",
                "bpf",
                "kexec_load",
            ]
            .contains(&name.as_str())
        })
        .collect();
    let spec = serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": allowed, "action": "SCMP_ACT_ALLOW" },
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW",
              "args": [{ "index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
            { "names": ["clone3", "socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
            { "names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 40, "op": "SCMP_CMP_NE" }] },
            { "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }] },
        ],
    });
    let (ours, theirs) = compare(&serde_json::from_value(spec).unwrap());
    println!("{ours} instructions; libseccomp alone makes {theirs}");
    assert!(ours < theirs / 2, "{ours} of {theirs}");
}

#[test]
fn no_rules_and_one_rule_mean_the_same() {
    for json in [
        r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#,
        r#"{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[{"names":["read"],"action":"SCMP_ACT_LOG"}]}"#,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],
            "syscalls":[{"names":["send","semop","restart_syscall"],"action":"SCMP_ACT_TRAP"}]}"#,
    ] {
        compare(&serde_json::from_str(json).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is named, once or twice, with and without conditions, in whatever order.
    #[test]
    fn any_rules_mean_what_libseccomp_makes_of_them(
        default in prop::sample::select(vec!["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", "SCMP_ACT_KILL_THREAD"]),
        foreign in prop::sample::subsequence(vec!["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"], 0..=3),
        rules in prop::collection::vec((
            prop::sample::subsequence(names(), 1..60),
            prop::sample::select(vec!["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRAP", "SCMP_ACT_KILL_PROCESS"]),
        ), 1..6),
        conditional in prop::sample::subsequence(names(), 0..8),
    ) {
        // Two unconditional rules with different actions are refused: a name is in one of them.
        let mut taken = std::collections::HashSet::new();
        let mut syscalls: Vec<_> = rules
            .into_iter()
            .map(|(names, action)| {
                let names: Vec<String> = names.into_iter().filter(|name| taken.insert(name.clone())).collect();
                serde_json::json!({ "names": names, "action": action })
            })
            .collect();
        let conditional: Vec<String> = conditional.into_iter().filter(|name| taken.insert(name.clone())).collect();
        syscalls.insert(0, serde_json::json!({
            "names": conditional, "action": "SCMP_ACT_LOG",
            "args": [{ "index": 1, "value": 8, "op": "SCMP_CMP_GE" }],
        }));
        let spec = serde_json::json!({ "defaultAction": default, "architectures": foreign, "syscalls": syscalls });
        compare(&serde_json::from_value(spec).unwrap());
    }
}
