//! The part of a filter that only looks at numbers: a search tree over ranges of system calls with the same action.
//!
//! A profile allows hundreds of system calls, nearly all of them whatever their arguments are, and their numbers are
//! neighbours. As a few dozen ranges a tree over them is a third of what libseccomp makes of them one by one, in a thirtieth
//! of the time; and the kernel's work at each loading of the filter (conversion, trial of every number, just-in-time
//! compilation) goes with its length. What such a tree does not decide, libseccomp's program behind it does.

use std::collections::BTreeMap;

use libc::sock_filter;

pub(super) const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
pub(super) const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
pub(super) const JUMP_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_NOT_LESS: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
pub(super) const RETURN: u16 = 0x06; // BPF_RET | BPF_K
/// Offsets in struct seccomp_data.
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCHITECTURE: u32 = 4;

/// What is returned for a number; None is left to the program behind the tree.
type Verdict = Option<u32>;

/// The verdicts on the system calls of one architecture, as the kernel names it (AUDIT_ARCH_*).
#[derive(Debug, Default)]
pub(super) struct Table(BTreeMap<u32, u32>);

impl Table {
    /// `number` is answered with `verdict`, a SECCOMP_RET_*, whatever its arguments are.
    pub(super) fn set(&mut self, number: u32, verdict: u32) {
        self.0.insert(number, verdict);
    }

    /// Whether it decides nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every number's verdict: where each range begins, from 0 on.
    fn ranges(&self) -> Vec<(u32, Verdict)> {
        let mut ranges = vec![(0, None)];
        let mut begin = |number: u32, verdict: Verdict| match ranges.last_mut() {
            Some((first, last)) if *first == number => *last = verdict,
            Some((_, last)) if *last == verdict => {}
            _ => ranges.push((number, verdict)),
        };
        for (&number, &verdict) in &self.0 {
            begin(number, Some(verdict));
            if let Some(next) = number.checked_add(1)
                && !self.0.contains_key(&next)
            {
                begin(next, None);
            }
        }
        ranges
    }
}

/// The tables' trees in front of `rest`, which is asked what they do not decide. The program loads and jumps anew: it may
/// begin anywhere, and so may `rest`.
pub(super) fn in_front_of(rest: &[sock_filter], tables: &BTreeMap<u32, Table>) -> Vec<sock_filter> {
    let mut code = vec![load(ARCHITECTURE)];
    for (&architecture, table) in tables.iter().filter(|(_, table)| !table.is_empty()) {
        let tree = tree(&table.ranges());
        // Another architecture jumps over the load of the number and the tree.
        code.push(instruction(JUMP_EQUAL, 1, 0, architecture));
        code.push(jump(tree.len().saturating_add(1)));
        code.push(load(NUMBER));
        code.extend(tree);
    }
    // Now that its distance is known.
    let end = code.len();
    for (index, instruction) in code.iter_mut().enumerate() {
        if instruction.code == JUMP && instruction.k == UNDECIDED {
            *instruction = jump(end.saturating_sub(index).saturating_sub(1));
        }
    }
    code.extend_from_slice(rest);
    code
}

/// One program for system calls of `architecture`, another for those of all others.
pub(super) fn either(
    architecture: u32,
    this: &[sock_filter],
    others: &[sock_filter],
) -> Vec<sock_filter> {
    let mut code = vec![
        load(ARCHITECTURE),
        instruction(JUMP_EQUAL, 1, 0, architecture),
        jump(this.len()),
    ];
    code.extend_from_slice(this);
    code.extend_from_slice(others);
    code
}

/// Stands for the distance to what is behind the trees. No program is as long.
const UNDECIDED: u32 = u32::MAX;

/// The search for the accumulator's range.
fn tree(ranges: &[(u32, Verdict)]) -> Vec<sock_filter> {
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let Some(&(begin, verdict)) = right.first() else {
        return vec![instruction(JUMP, 0, 0, UNDECIDED)];
    };
    if left.is_empty() {
        return vec![match verdict {
            Some(verdict) => instruction(RETURN, 0, 0, verdict),
            None => instruction(JUMP, 0, 0, UNDECIDED),
        }];
    }
    let (left, right) = (tree(left), tree(right));
    let mut code = match u8::try_from(left.len()) {
        Ok(distance) => vec![instruction(JUMP_NOT_LESS, distance, 0, begin)],
        _ => vec![instruction(JUMP_NOT_LESS, 0, 1, begin), jump(left.len())],
    };
    code.extend(left);
    code.extend(right);
    code
}

pub(super) fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn load(offset: u32) -> sock_filter {
    instruction(LOAD, 0, 0, offset)
}

fn jump(distance: usize) -> sock_filter {
    // A program is at most 4096 instructions long; the kernel refuses others.
    let distance = u32::try_from(distance).unwrap_or(UNDECIDED);
    instruction(JUMP, 0, 0, distance)
}
