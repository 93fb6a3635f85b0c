//! Containers and processes with a terminal.

use super::support::*;
use serde_json::json;
use std::os::fd::AsFd;

#[test]
fn a_terminal_of_the_containers_own() {
    in_sandbox(|sandbox| {
        let script = "tty; stty size; test -c /dev/console && stat -c %t:%T /dev/console; echo >/dev/tty via tty; \
            read line; echo got $line; stty size";
        let mut spec = spec(&["sh", "-c", script]);
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"height": 33, "width": 77});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let mut boxed = sandbox.create("c1", &spec)?;
        let master = boxed.terminal.take().unwrap();
        boxed.container.start()?;
        resize(master.as_fd(), 10, 20)?;
        rustix::io::write(&master, b"line\n")?;
        let output = read_all(master);
        assert_eq!(boxed.wait(), 0, "{output}");
        assert!(output.contains("/dev/pts/0\r\n"), "{output}");
        assert!(output.contains("88:0"), "/dev/console is pts 0: {output}");
        assert!(
            output.contains("via tty"),
            "it is the controlling terminal: {output}"
        );
        assert!(
            output.contains("got line") && output.contains("10 20"),
            "{output}"
        );
        boxed.delete()
    });
}

#[test]
fn exec_with_a_terminal() {
    in_sandbox(|sandbox| {
        let spec = spec(&["sleep", "100"]);
        let mut boxed = sandbox.create("c1", &spec)?;
        boxed.container.start()?;
        let mut process = spec["process"].clone();
        process["terminal"] = json!(true);
        process["args"] = json!(["sh", "-c", "tty; stty size"]);
        let stdio = Stdio {
            size: Some((5, 6)),
            ..Stdio::default()
        };
        let mut made =
            boxed
                .container
                .exec(&serde_json::from_value(process)?, stdio, &Birth::default())?;
        let output = read_all(made.terminal.take().unwrap());
        assert_eq!(reap(made.process.pidfd()), 0);
        assert_eq!(output, "/dev/pts/0\r\n5 6\r\n");
        boxed.container.kill_all(libc::SIGKILL)?;
        boxed.wait();
        boxed.delete()
    });
}

#[test]
fn a_terminal_needs_a_devpts() {
    in_sandbox(|sandbox| {
        let mut spec = spec(&["true"]);
        spec["process"]["terminal"] = json!(true);
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .retain(|m| m["type"] != "devpts");
        let error = sandbox.create("c1", &spec).err().unwrap();
        assert!(matches!(error, Error::Terminal { .. }), "{error}");
        // An image's own idea of a multiplexer is none.
        std::fs::create_dir_all(sandbox.root().join("dev/pts"))?;
        std::fs::write(sandbox.root().join("dev/pts/ptmx"), "")?;
        spec["mounts"]
            .as_array_mut()
            .unwrap()
            .retain(|m| m["destination"] != "/dev");
        let error = sandbox.create("c1", &spec).err().unwrap();
        assert!(matches!(error, Error::Terminal { .. }), "{error}");
        Ok(())
    });
}
