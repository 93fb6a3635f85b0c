//! The command line that containerd gives to a shim: flags as Go's `flag` package has them, then an action.

use std::path::PathBuf;

use crate::error::ErrorKind;
use crate::sandbox::Error;

/// What the shim is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make the shim of a bundle (or find the pod's) and print its address.
    Start,
    /// Clean up after a dead shim.
    Delete,
    /// Be the shim: how `start` runs this program again.
    Serve,
    /// Print a RuntimeInfo.
    Info,
    /// Print the version.
    Version,
}

/// The command line, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's own gRPC socket.
    pub address: String,
    /// The containerd binary, for `publish`. Not used: events go by ttrpc.
    pub publish_binary: String,
    /// The container's id.
    pub id: String,
    /// The bundle, for `delete`.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// What to do.
    pub action: Action,
}

impl Args {
    /// Takes the command line apart; the program's name is not in it.
    ///
    /// # Errors
    /// `InvalidArgument`: a flag or action that there is not, or one that lacks its value.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Self, Error> {
        let mut args = Self {
            namespace: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            id: String::new(),
            bundle: None,
            debug: false,
            action: Action::Serve,
        };
        let mut words = words.peekable();
        while let Some(word) = words.peek().filter(|word| word.starts_with('-')) {
            let flag = word.trim_start_matches('-').to_owned();
            words.next();
            args.flag(&flag, &mut words)?;
        }
        if let Some(action) = words.next() {
            args.action = match action.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                other => return Err(usage(format!("'{other}' is neither start nor delete"))),
            };
        }
        if let Some(more) = words.next() {
            return Err(usage(format!("'{more}' after the action")));
        }
        args.check()
    }

    fn flag(&mut self, flag: &str, words: &mut impl Iterator<Item = String>) -> Result<(), Error> {
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let mut value = || {
            inline
                .clone()
                .or_else(|| words.next())
                .ok_or_else(|| usage(format!("-{name} lacks its value")))
        };
        match name {
            "namespace" => self.namespace = value()?,
            "address" => self.address = value()?,
            "publish-binary" => self.publish_binary = value()?,
            "id" => self.id = value()?,
            "bundle" => self.bundle = Some(value()?.into()),
            "debug" => self.debug = inline.as_deref() != Some("false"),
            "v" | "version" => self.action = Action::Version,
            "info" => self.action = Action::Info,
            // Of containerd's own debugging: where to serve Go profiles.
            "socket" | "debug-socket" => drop(value()?),
            other => return Err(usage(format!("there is no flag -{other}"))),
        }
        Ok(())
    }

    fn check(self) -> Result<Self, Error> {
        if matches!(self.action, Action::Info | Action::Version) {
            return Ok(self);
        }
        if self.namespace.is_empty() {
            return Err(usage("-namespace is missing".into()));
        }
        if self.id.is_empty() {
            return Err(usage("-id is missing".into()));
        }
        // They become parts of paths.
        crate::paths::check_id(&self.id)?;
        crate::paths::check_id(&self.namespace)?;
        Ok(self)
    }
}

fn usage(message: String) -> Error {
    Error::state(ErrorKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, Error> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_containerd_says_is_understood() {
        let args = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id abc start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str()),
            ("k8s.io", "abc")
        );
        let args = parse("--namespace=n --debug -id x -bundle /b delete").unwrap();
        assert_eq!(args.action, Action::Delete);
        assert!(args.debug);
        assert_eq!(args.bundle, Some("/b".into()));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in [
            "start",
            "-namespace n start",
            "-namespace n -id ../x start",
            "-namespace a/b -id x start",
            "-namespace n -id x stop",
            "-namespace n -id x start more",
            "-namespace n -id",
            "-bogus",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
