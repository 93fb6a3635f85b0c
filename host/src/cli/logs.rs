//! `cella logs`: the output of a detached container, kept in CRI's log format, so that its readers know it:
//! `RFC3339Nano stream P|F text`.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::{Context, Error};
use crate::container::Record;

/// Bytes of text after which a line is split, as CRI has it.
const MAX_TEXT: usize = 16 * 1024;

/// Show what a detached container wrote
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  cella run -d --name job oci:busybox -- echo hello\n  cella logs job"
)]
pub struct Args {
    /// The container
    id: String,
}

/// An output stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A log that both streams of a container write.
pub struct LogWriter(Mutex<File>);

/// One stream's unfinished line.
pub struct Lines<'a> {
    log: &'a LogWriter,
    stream: Stream,
    text: Vec<u8>,
}

impl LogWriter {
    /// Makes the file, mode 0640.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)?;
        Ok(Self(Mutex::new(file)))
    }

    /// Takes one stream's bytes.
    pub fn lines(&self, stream: Stream) -> Lines<'_> {
        Lines {
            log: self,
            stream,
            text: Vec::new(),
        }
    }
}

impl Lines<'_> {
    /// Writes every whole line and every full piece of an overlong one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            for part in text.chunks(MAX_TEXT) {
                let room = MAX_TEXT - self.text.len();
                let (now, later) = part.split_at(room.min(part.len()));
                self.text.extend_from_slice(now);
                if self.text.len() == MAX_TEXT {
                    self.write('P')?;
                }
                self.text.extend_from_slice(later);
            }
            if ends {
                self.write('F')?;
            }
        }
        Ok(())
    }

    /// Writes what is left of a line that has no end.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn end(mut self) -> io::Result<()> {
        match self.text.is_empty() {
            true => Ok(()),
            false => self.write('P'),
        }
    }

    fn write(&mut self, tag: char) -> io::Result<()> {
        let mut line = format!("{} {} {tag} ", timestamp(), self.stream.name()).into_bytes();
        line.append(&mut self.text);
        line.push(b'\n');
        let mut file = self.log.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&line)
    }
}

/// Now, RFC 3339 in UTC with nanoseconds.
fn timestamp() -> String {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let (days, seconds) = (now.tv_sec.div_euclid(86_400), now.tv_sec.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        now.tv_nsec
    )
}

/// The Gregorian date of a day counted from 1970-01-01, by whole 400-year eras that begin in March.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

/// Writes a container's log to this process's streams.
pub fn main(context: &Context, args: &Args) -> Result<u8, Error> {
    let record = Record::open(&context.paths, &args.id)?;
    let path = record.log();
    let action = || format!("reading the log of container {}", args.id);
    let file = File::open(&path).map_err(|e| Error::host(action(), e))?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader
            .read_until(b'\n', &mut line)
            .map_err(|e| Error::host(action(), e))?
            == 0
        {
            return Ok(0);
        }
        let shown = match parse(&line) {
            Some((Stream::Stdout, text)) => io::stdout().lock().write_all(&text),
            Some((Stream::Stderr, text)) => io::stderr().lock().write_all(&text),
            None => Ok(()),
        };
        match shown {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(0),
            other => other.map_err(|e| Error::host(action(), e))?,
        }
    }
}

/// A log line's stream and text, with its newline if it was a full one.
fn parse(line: &[u8]) -> Option<(Stream, Vec<u8>)> {
    let mut fields = line
        .strip_suffix(b"\n")
        .unwrap_or(line)
        .splitn(4, |b| *b == b' ');
    let _time = fields.next()?;
    let stream = match fields.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let full = fields.next()? == b"F";
    let mut text = fields.next()?.to_vec();
    if full {
        text.push(b'\n');
    }
    Some((stream, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(pieces: &[&[u8]]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = LogWriter::create(&path).unwrap();
        let mut lines = log.lines(Stream::Stdout);
        for piece in pieces {
            lines.take(piece).unwrap();
        }
        lines.end().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        text.lines()
            .map(|line| line.split_once(" stdout ").unwrap().1.to_owned())
            .collect()
    }

    #[test]
    fn lines_are_put_together_and_an_unfinished_one_is_partial() {
        assert_eq!(logged(&[b"a", b"b\nc\n\nd"]), ["F ab", "F c", "F ", "P d"]);
    }

    #[test]
    fn long_lines_are_split_and_lose_nothing() {
        let long = vec![b'x'; MAX_TEXT * 2 + 5];
        for pieces in [vec![&long[..], b"\n"], vec![&long[..7], &long[7..], b"\n"]] {
            let lines = logged(&pieces);
            let lengths: Vec<_> = lines.iter().map(|l| (&l[..1], l.len() - 2)).collect();
            assert_eq!(lengths, [("P", MAX_TEXT), ("P", MAX_TEXT), ("F", 5)]);
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        assert_eq!(
            parse(b"2026-01-01T00:00:00.000000000Z stderr F a b \n"),
            Some((Stream::Stderr, b"a b \n".to_vec()))
        );
        assert_eq!(
            parse(b"x stdout P a\n"),
            Some((Stream::Stdout, b"a".to_vec()))
        );
        assert_eq!(parse(b"nonsense\n"), None);
    }

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(20_781), (2026, 11, 24));
    }
}
