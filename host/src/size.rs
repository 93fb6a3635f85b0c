//! Sizes as people write them: `512M`, `2GiB`, `1048576`.

/// Why a text is no size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no size: a whole number, with K, M, G or T (powers of 1024) after it")]
pub struct SizeError(String);

/// Bytes that `text` stands for.
///
/// # Errors
/// It is no number with one of the units, or passes 2^64.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let error = || SizeError(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kib" | "kb" => 10,
        "m" | "mi" | "mib" | "mb" => 20,
        "g" | "gi" | "gib" | "gb" => 30,
        "t" | "ti" | "tib" | "tb" => 40,
        _ => return Err(error()),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse("128M"), Ok(128 << 20));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("4096"), Ok(4096));
        for wrong in [
            "",
            "M",
            "-1M",
            "1.5G",
            "12Q",
            "99999999999999999999",
            "17000000T",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
