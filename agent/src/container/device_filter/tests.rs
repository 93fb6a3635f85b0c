use super::*;

/// Runs a program as the kernel would, for the instructions this module makes. None is a fault.
fn interpret(
    program: &[Instruction],
    kind: u32,
    access: u32,
    major: u32,
    minor: u32,
) -> Option<u64> {
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0u64; 11];
    let mut pc = 0usize;
    // Jumps only go forward, so it ends.
    loop {
        let i = program.get(pc)?;
        pc += 1;
        let (to, from) = ((i.registers & 15) as usize, (i.registers >> 4) as usize);
        let mut jump = |taken: bool| {
            if taken {
                pc = (pc as i64 + i64::from(i.offset)) as usize;
            }
        };
        match i.code {
            LOAD_WORD => registers[to] = u64::from(*context.get(i.offset as usize / 4)?),
            ALU32_MOV_REGISTER => registers[to] = registers[from] & 0xffff_ffff,
            ALU32_AND => registers[to] = u64::from(registers[to] as u32 & i.immediate as u32),
            ALU32_SHIFT_RIGHT => registers[to] = u64::from(registers[to] as u32 >> i.immediate),
            ALU64_MOV => registers[to] = i.immediate as i64 as u64,
            JUMP32_EQUAL => jump(registers[to] as u32 == i.immediate as u32),
            JUMP32_NOT_EQUAL => jump(registers[to] as u32 != i.immediate as u32),
            EXIT => return Some(registers[0]),
            _ => return None,
        }
    }
}

fn filter(json: &str) -> DeviceFilter {
    DeviceFilter::new(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()).unwrap()
}

fn allows(filter: &DeviceFilter, kind: u32, access: u32, major: u32, minor: u32) -> bool {
    match &filter.program {
        None => true,
        Some(program) => match interpret(program, kind, access, major, minor) {
            Some(0) => false,
            Some(1) => true,
            other => panic!("the program ended with {other:?}"),
        },
    }
}

/// What the spec says, straight: for each access, the last rule that matches decides.
fn specified(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
    [MKNOD, READ, WRITE]
        .into_iter()
        .filter(|bit| access & bit != 0)
        .all(|bit| {
            let same = |want: Option<u32>, is: u32| want.is_none_or(|want| want == is);
            rules
                .iter()
                .rev()
                .find(|r| {
                    same(r.kind, kind)
                        && same(r.major, major)
                        && same(r.minor, minor)
                        && r.access & bit != 0
                })
                .is_some_and(|r| r.allow)
        })
}

#[test]
fn denied_by_default_but_for_what_every_container_has() {
    for json in ["[]", r#"[{"allow":false,"access":"rwm"}]"#] {
        let filter = filter(json);
        assert!(allows(&filter, CHAR, ALL, 1, 3), "null");
        assert!(
            allows(&filter, CHAR, READ | WRITE, 136, 77),
            "a pseudo-terminal"
        );
        assert!(allows(&filter, BLOCK, MKNOD, 8, 0), "making a node");
        assert!(!allows(&filter, BLOCK, READ, 8, 0), "a disk");
        assert!(!allows(&filter, CHAR, READ, 1, 1), "memory");
        assert!(
            !allows(&filter, BLOCK, READ, 1, 3),
            "a block device with null's numbers"
        );
    }
}

#[test]
fn a_later_rule_outweighs_an_earlier_one() {
    let filter = filter(
        r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"access":"rw"},
        {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
    );
    assert!(allows(&filter, BLOCK, READ | WRITE, 8, 0));
    assert!(allows(&filter, BLOCK, READ, 8, 1));
    assert!(!allows(&filter, BLOCK, WRITE, 8, 1));
    assert!(
        !allows(&filter, BLOCK, READ | WRITE, 8, 1),
        "one denied access denies both"
    );
    assert!(!allows(&filter, BLOCK, READ, 9, 0));
}

#[test]
fn a_privileged_container_needs_no_program() {
    assert!(
        filter(r#"[{"allow":true,"access":"rwm"}]"#)
            .program
            .is_none()
    );
    assert!(
        filter(r#"[{"allow":false},{"allow":true,"type":"a","access":"rwm"}]"#)
            .program
            .is_none()
    );
    let but_one = filter(
        r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"c","major":1,"minor":1,"access":"r"}]"#,
    );
    assert!(allows(&but_one, BLOCK, ALL, 8, 0));
    assert!(!allows(&but_one, CHAR, READ, 1, 1));
    assert!(allows(&but_one, CHAR, WRITE, 1, 1));
}

#[test]
fn nonsense_is_refused() {
    for json in [
        r#"[{"allow":true,"access":"rx"}]"#,
        r#"[{"allow":true,"type":"p"}]"#,
        r#"[{"allow":true,"type":"c","major":-2}]"#,
        r#"[{"allow":true,"type":"c","major":4294967296}]"#,
    ] {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        assert!(DeviceFilter::new(&rules).is_err(), "{json}");
    }
}

#[test]
fn rules_by_the_thousand_are_compiled_right() {
    let rules: Vec<Rule> = (0..5000)
        .map(|minor| Rule {
            kind: Some(CHAR),
            major: Some(8),
            minor: Some(minor),
            access: READ,
            allow: minor % 2 == 0,
        })
        .collect();
    let program = compile(&rules);
    for minor in [0, 1, 1023, 1024, 2500, 4998, 4999, 5000] {
        let expected = u64::from(minor % 2 == 0 && minor < 5000);
        assert_eq!(
            interpret(&program, CHAR, READ, 8, minor),
            Some(expected),
            "{minor}"
        );
        assert_eq!(
            interpret(&program, BLOCK, READ, 8, minor),
            Some(0),
            "{minor}"
        );
    }
}

#[test]
fn what_every_container_has_is_asked_for_once() {
    let filter = filter("[]");
    let program = filter.program.unwrap();
    let jumps = program
        .iter()
        .filter(|i| i.code == JUMP32_NOT_EQUAL)
        .count();
    // A type and its two majors, eight minors, a major of all minors; and two types of which nodes may be made.
    assert!(jumps <= 16, "{jumps} jumps in {program:?}");
}

#[test]
fn the_kernel_takes_the_program() {
    let filter = filter(r#"[{"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]"#);
    match load(&filter.program.unwrap()) {
        Ok(_) => {}
        Err(e) => match e.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => println!("SKIPPED: no right to load BPF programs"),
            _ => panic!("the verifier refused the program: {e}"),
        },
    }
}

mod property {
    use proptest::prelude::*;

    use super::*;

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || prop::option::of(0u32..3);
        (
            prop::option::of(1u32..3),
            number(),
            number(),
            0u32..8,
            any::<bool>(),
        )
            .prop_map(|(kind, major, minor, access, allow)| Rule {
                kind,
                major,
                minor,
                access,
                allow,
            })
    }

    proptest! {
        #[test]
        fn the_program_decides_as_the_rules(
            rules in prop::collection::vec(rule(), 0..12),
            kind in 1u32..3, access in 1u32..8, major in 0u32..3, minor in 0u32..3,
        ) {
            let result = interpret(&compile(&rules), kind, access, major, minor);
            let expected = u64::from(specified(&rules, kind, access, major, minor));
            prop_assert_eq!(result, Some(expected));
        }

        /// It refuses, among others, instructions that are never reached.
        #[test]
        fn the_kernel_takes_every_program(rules in prop::collection::vec(rule(), 0..12)) {
            match load(&compile(&rules)) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) || e.raw_os_error() == Some(libc::E2BIG) => {
                    prop_assert!(false, "{e}: {:?}", compile(&rules));
                }
                // Without the right to load programs nothing is known.
                _ => {}
            }
        }
    }
}
