//! The timeline as a picture: one bar a phase, from left to right in time, from top to bottom in order.

use std::fmt::Write;

use super::Phase;

const WIDTH: f64 = 960.0;
const LABELS: f64 = 300.0;
const ROW: f64 = 26.0;
const TOP: f64 = 50.0;

/// Draws the phases as an SVG document.
pub fn svg(phases: &[Phase]) -> String {
    let total: u64 = phases.iter().map(|phase| phase.duration_us).sum();
    let height = TOP + ROW * phases.len() as f64 + 30.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"28\" font-size=\"17\">From exec to first output: {}</text>\n",
        human(total)
    );
    let scale = (WIDTH - LABELS - 110.0) / total.max(1) as f64;
    for (row, phase) in phases.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let x = LABELS + phase.start_us as f64 * scale;
        let width = (phase.duration_us as f64 * scale).max(1.5);
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "<text x=\"12\" y=\"{text}\"><tspan font-weight=\"bold\">{who}</tspan> {name}</text>\n\
             <rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/>\n\
             <text x=\"{after:.1}\" y=\"{text}\" fill=\"#555\">{duration}</text>\n",
            text = y + 14.0,
            who = phase.who,
            name = phase.name,
            colour = colour(phase.who),
            after = x + width + 6.0,
            duration = human(phase.duration_us),
        );
    }
    out.push_str("</svg>\n");
    out
}

fn colour(who: &str) -> &'static str {
    match who {
        "host" => "#4e79a7",
        "vmm" => "#f28e2b",
        "kernel" => "#e15759",
        "agent" => "#59a14f",
        _ => "#b07aa1",
    }
}

fn human(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}
