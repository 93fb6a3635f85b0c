//! A person at a terminal: `-it` passes on what is typed, what is shown, and the window's size as it changes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use super::pod::Pod;
use cella_tests::wait;

/// A terminal with a `cella` at it.
struct Person {
    master: File,
    slave: OwnedFd,
    cella: Child,
    shown: Receiver<Vec<u8>>,
    seen: String,
}

impl Person {
    fn sit_down(pod: &Pod, size: (u16, u16), args: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap()
            .into();
        resize(&master, size);
        let stream = || slave.try_clone().unwrap();
        let mut command = pod.host.command(args);
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: between fork and exec only two system calls are made.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let cella = command.spawn().unwrap();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        let (sender, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut piece) {
                if sender.send(piece[..len].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            master,
            slave,
            cella,
            shown,
            seen: String::new(),
        }
    }

    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Looks at the screen until `text` is on it, below what was found before.
    #[track_caller]
    fn see(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(piece) = self.shown.recv_timeout(left) else {
                panic!("{text:?} is not shown, but {:?}", self.seen);
            };
            self.seen.push_str(&String::from_utf8_lossy(&piece));
        }
    }
}

fn resize(terminal: impl AsFd, (rows, columns): (u16, u16)) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn a_shell_at_a_terminal() {
    let Some(pod) = Pod::boot("1") else { return };
    let mut person = Person::sit_down(&pod, (30, 100), &["exec", "-it", "c", "sh"]);
    let before = tcgetattr(&person.slave).unwrap();
    person.type_in("tty; stty size; echo $((6 * 7))\n");
    person.see("/dev/pts/");
    person.see("30 100");
    person.see("42");
    // The window is made larger: the guest's programs hear of it.
    person.type_in("sh -c 'trap \"stty size; exit\" WINCH; echo rea\"\"dy; while :; do sleep 1 & wait $!; done'\n");
    person.see("ready");
    resize(&person.master, (50, 132));
    person.see("50 132");
    // ^C is for the program in the foreground, not for cella. Before that runs it would be a byte for the shell's editor.
    person.see("# ");
    person.type_in("echo go\"\"ing; sleep 1000; echo slept $?\n");
    person.see("going");
    std::thread::sleep(Duration::from_millis(500));
    person.type_in("\x03");
    person.type_in("echo still he\"\"re\n");
    person.see("still here");
    person.type_in("exit 4\n");
    assert_eq!(wait(&mut person.cella, Duration::from_secs(30)), 4);
    let after = tcgetattr(&person.slave).unwrap();
    assert_eq!(
        format!("{:?}", after.local_modes),
        format!("{:?}", before.local_modes),
        "descriptor {} is as it was",
        person.slave.as_raw_fd()
    );
    pod.end();
}

#[test]
fn a_container_at_a_terminal_ends_with_its_shell() {
    let Some(pod) = Pod::boot("1") else { return };
    let image = pod.host.busybox();
    let args = ["run", "--pod", "pod", "-it", &image, "sh"];
    let mut person = Person::sit_down(&pod, (25, 81), &args);
    person.type_in("stty size; hostname\n");
    person.see("25 81");
    person.see("pod\r\n");
    person.see("# ");
    // ^D is the end of the input.
    person.type_in("\x04");
    assert_eq!(wait(&mut person.cella, Duration::from_secs(30)), 0);
    pod.end();
}
