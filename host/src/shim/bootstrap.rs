//! How a shim and containerd find each other: what `start` reads and what it answers.
//!
//! containerd up to 2.2 gives the runtime's options (an Any) or nothing and takes a plain address; 2.3 gives
//! `BootstrapParams` and takes a `BootstrapResult`. An Any may well parse as `BootstrapParams`, so these count only if they
//! repeat what the flags say.

use std::io::{self, Read, Write};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use super::args::Args;
use super::settings;

/// The most that is read from standard input, bytes.
const MAX_INPUT: u64 = 4 << 20;

/// Whether the `input` of `start` is `BootstrapParams`.
pub fn is_modern(input: &[u8], args: &Args) -> bool {
    !input.is_empty()
        && BootstrapParams::parse_from_bytes(input)
            .is_ok_and(|params| params.instance_id == args.id && params.namespace == args.namespace)
}

/// The runtime's options in the `input` of `start`: an Any, or in `BootstrapParams` one among the extensions.
pub fn options(input: &[u8], args: &Args) -> Option<Any> {
    let is_options = |any: &Any| any.type_url.ends_with(settings::OPTIONS);
    if !is_modern(input, args) {
        return Any::parse_from_bytes(input).ok().filter(is_options);
    }
    let params = BootstrapParams::parse_from_bytes(input).ok()?;
    let mut extensions = params.extensions.into_iter();
    extensions.find_map(|extension| extension.value.into_option().filter(is_options))
}

/// Reads all of standard input. No input is no error: containerd may leave it closed.
pub fn read_input() -> Vec<u8> {
    let mut input = Vec::new();
    let _ = io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input);
    input
}

/// What containerd is to read from standard output.
///
/// # Errors
/// The message cannot be encoded.
pub fn answer(address: &str, modern: bool) -> io::Result<Vec<u8>> {
    if !modern {
        return Ok(address.as_bytes().to_vec());
    }
    let result = BootstrapResult {
        version: 3,
        address: address.to_owned(),
        protocol: "ttrpc".to_owned(),
        ..Default::default()
    };
    result.write_to_bytes().map_err(io::Error::other)
}

/// Writes to standard output.
///
/// # Errors
/// Nobody reads it.
pub fn print(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> Args {
        let line = "-namespace default -id one start";
        Args::parse(line.split(' ').map(str::to_owned)).unwrap()
    }

    #[test]
    fn each_containerd_gets_the_answer_that_it_reads() {
        let params = BootstrapParams {
            instance_id: "one".into(),
            namespace: "default".into(),
            ..Default::default()
        };
        assert!(is_modern(&params.write_to_bytes().unwrap(), &args()));
        let result = answer("unix:///run/x", true).unwrap();
        let result = BootstrapResult::parse_from_bytes(&result).unwrap();
        assert_eq!(
            (result.version, result.address.as_str()),
            (3, "unix:///run/x")
        );

        assert!(!is_modern(b"", &args()));
        // An Any has strings in the same two fields.
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"x".to_vec(),
            ..Default::default()
        };
        let bytes = options.write_to_bytes().unwrap();
        assert!(!is_modern(&bytes, &args()));
        assert_eq!(super::options(&bytes, &args()), Some(options));
        assert_eq!(super::options(b"", &args()), None);
        assert_eq!(answer("unix:///run/x", false).unwrap(), b"unix:///run/x");
    }
}
