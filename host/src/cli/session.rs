//! A process of a container and this process, together until the first has ended.

use std::sync::Arc;

use cella_proto::agent::Exit;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::streams::{Output, Pumps};
use super::{Error, background, terminal};
use crate::sandbox::Sandbox;
use crate::sandbox::stdio::{Streams, Wanted};
use crate::timeline::Timeline;

/// Which of this process's streams and signals are the other's.
pub struct Session<'a> {
    /// The sandbox that it is in.
    pub sandbox: &'a Sandbox,
    /// Its container.
    pub container: &'a str,
    /// Its exec id; empty for the init.
    pub exec: &'a str,
    /// This process's terminal is its.
    pub terminal: bool,
    /// Where its output goes.
    pub output: Output,
    /// For the first output.
    pub timeline: Option<Arc<Timeline>>,
}

/// The streams that `-i` and `-t` ask for.
pub fn wanted(interactive: bool, tty: bool) -> Wanted {
    Wanted {
        stdin: interactive,
        terminal: tty.then(terminal::size),
    }
}

impl Session<'_> {
    /// Starts the process, passes streams and signals on, and returns its end when its output has ended too.
    ///
    /// # Errors
    /// It cannot be started, or its sandbox is gone.
    pub async fn run(self, streams: Streams, started: impl FnOnce(u32)) -> Result<Exit, Error> {
        let mut signals = Signals::new()?;
        let raw = (self.terminal && terminal::is_present())
            .then(terminal::Raw::enter)
            .transpose()?;
        let pid = self.sandbox.start(self.container, self.exec).await?;
        if let Some(timeline) = &self.timeline {
            timeline.mark("started");
        }
        started(pid);
        background::report_ready();
        let pumps = Pumps::start(streams, &self.output, self.timeline.clone());
        let exit = self.wait(&mut signals).await?;
        pumps.finish().await;
        drop(raw);
        Ok(exit)
    }

    async fn wait(&self, signals: &mut Signals) -> Result<Exit, Error> {
        let mut ended = std::pin::pin!(self.sandbox.wait(self.container, self.exec));
        loop {
            let number = tokio::select! {
                exit = &mut ended => return Ok(exit?),
                number = signals.next() => number,
            };
            let passed = match number {
                libc::SIGWINCH => {
                    let size = terminal::size();
                    self.sandbox.resize(self.container, self.exec, size).await
                }
                number => {
                    let number = number.unsigned_abs();
                    self.sandbox
                        .signal(self.container, self.exec, number, false)
                        .await
                }
            };
            if let Err(error) = passed {
                // It may have ended a moment ago; whether it has, the loop tells.
                tracing::debug!("passing signal {number} on: {error}");
            }
        }
    }
}

/// Takes the output of a container's first process, which runs already, to its end, and returns that.
///
/// # Errors
/// Its sandbox is gone.
pub async fn follow(
    sandbox: &Sandbox,
    container: &str,
    streams: Streams,
    output: &Output,
) -> Result<Exit, Error> {
    let pumps = Pumps::start(streams, output, None);
    let exit = sandbox.wait(container, "").await?;
    pumps.finish().await;
    Ok(exit)
}

/// The signals that are passed on to the process.
struct Signals(Vec<(i32, Signal)>);

impl Signals {
    fn new() -> Result<Self, Error> {
        let numbers = [
            libc::SIGINT,
            libc::SIGTERM,
            libc::SIGHUP,
            libc::SIGQUIT,
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGWINCH,
        ];
        let watch = |number| Ok((number, signal(SignalKind::from_raw(number))?));
        let signals: std::io::Result<Vec<_>> = numbers.into_iter().map(watch).collect();
        Ok(Self(
            signals.map_err(|e| Error::host("watching for signals", e))?,
        ))
    }

    /// The number of the next one.
    async fn next(&mut self) -> i32 {
        std::future::poll_fn(|context| {
            for (number, signal) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(*number);
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}
