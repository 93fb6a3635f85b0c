//! Real containers, as root on the host: each test makes its own in a child process of fresh mount and pid
//! namespaces, with busybox for a root filesystem, and prints `SKIPPED` where it cannot.

mod support;

use support::*;

#[test]
fn a_container_runs_and_its_exit_status_arrives() {
    in_sandbox(|sandbox| {
        let mut box_ = sandbox.create("c1", &spec(&["sh", "-c", "echo hello; exit 7"]))?;
        assert_eq!(box_.container.status(), Status::Created);
        assert_eq!(box_.container.pids()?, [box_.container.pid()]);
        box_.container.start()?;
        assert_eq!(box_.output(), "hello\n");
        assert_eq!(box_.wait(), 7);
        box_.delete()
    });
}
