//! Draws the figures of `make bench`: `plot DIR` reads DIR/*.json and writes DIR/figures.svg, one chart a unit.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support"
)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

const WIDTH: f64 = 960.0;
const LABELS: f64 = 400.0;
const ROW: f64 = 22.0;
const TOP: f64 = 20.0;

/// What the end of a figure's name says of it.
const UNITS: [(&str, &str); 6] = [
    ("_ms", "milliseconds"),
    ("_us", "microseconds"),
    ("_mib_per_s", "MiB a second"),
    ("_per_s", "a second"),
    ("_kib", "KiB"),
    (
        "ratio",
        "ours to the stock daemons (more than 1: ours is better)",
    ),
];

/// Rows by unit: a label and a figure.
type Charts = BTreeMap<usize, Vec<(String, f64)>>;

fn main() {
    let dir = PathBuf::from(std::env::args_os().nth(1).expect("usage: plot DIR"));
    let mut files: Vec<_> = fs::read_dir(&dir)
        .expect("the directory of the figures")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    let mut charts = Charts::new();
    for file in files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        match serde_json::from_str(&text) {
            Ok(figures) => collect(&mut charts, &name, &figures),
            Err(error) => eprintln!("{}: {error}", file.display()),
        }
    }
    let picture = dir.join("figures.svg");
    fs::write(&picture, svg(&charts)).unwrap();
    println!("{}", picture.display());
}

/// Takes the figures of `value`, and those one level below.
fn collect(charts: &mut Charts, name: &str, value: &Value) {
    let Value::Object(figures) = value else {
        return;
    };
    for (key, value) in figures {
        match (
            value.as_f64(),
            UNITS.iter().position(|(end, _)| key.ends_with(end)),
        ) {
            (Some(figure), Some(unit)) => {
                charts
                    .entry(unit)
                    .or_default()
                    .push((format!("{name}: {key}"), figure));
            }
            _ => collect(charts, &format!("{name}: {key}"), value),
        }
    }
}

fn svg(charts: &Charts) -> String {
    let mut body = String::new();
    let mut y = TOP;
    for (unit, rows) in charts {
        writeln!(
            body,
            "<text x=\"12\" y=\"{}\" font-size=\"16\" font-weight=\"bold\">{}</text>",
            y + 14.0,
            UNITS[*unit].1
        )
        .unwrap();
        y += 28.0;
        let largest = rows
            .iter()
            .map(|(_, figure)| *figure)
            .fold(f64::MIN_POSITIVE, f64::max);
        for (label, figure) in rows {
            let width = (figure / largest * (WIDTH - LABELS - 100.0)).max(1.5);
            writeln!(
                body,
                "<text x=\"12\" y=\"{text}\">{label}</text>\n\
                 <rect x=\"{LABELS}\" y=\"{y}\" width=\"{width:.1}\" height=\"15\" fill=\"#4e79a7\"/>\n\
                 <text x=\"{after:.1}\" y=\"{text}\" fill=\"#555\">{figure}</text>",
                text = y + 12.0,
                after = LABELS + width + 6.0,
                figure = short(*figure),
            )
            .unwrap();
            y += ROW;
        }
        y += 18.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

/// Three digits that tell something.
fn short(figure: f64) -> String {
    match figure {
        100.0.. => format!("{figure:.0}"),
        10.0.. => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}
