//! Where a boot's instructions go, as a picture: one bar a phase, from left to right and from top to bottom in order.

use std::fmt::Write as _;

use super::Phase;

const WIDTH: f64 = 960.0;
const LABELS: f64 = 270.0;
const ROW: f64 = 24.0;
const TOP: f64 = 56.0;

/// Draws `phases` as an SVG document.
pub fn svg(phases: &[Phase]) -> String {
    let total: u64 = phases.iter().map(|phase| phase.instructions).sum();
    let height = TOP + ROW * phases.len() as f64 + 20.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"28\" font-size=\"17\">From reset to the agent's readiness: {} million guest instructions</text>\n",
        millions(total)
    );
    let scale = (WIDTH - LABELS - 80.0) / total.max(1) as f64;
    let mut before = 0;
    for (row, phase) in phases.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let x = LABELS + before as f64 * scale;
        let width = (phase.instructions as f64 * scale).max(1.0);
        before += phase.instructions;
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "<text x=\"12\" y=\"{text}\">{name}</text>\n\
             <rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"17\" fill=\"{colour}\"/>\n\
             <text x=\"{after:.1}\" y=\"{text}\" fill=\"#555\">{count}</text>\n",
            text = y + 13.0,
            name = phase.name,
            colour = colour(phase),
            after = x + width + 6.0,
            count = millions(phase.instructions),
        );
    }
    out.push_str("</svg>\n");
    out
}

fn colour(phase: &Phase) -> &'static str {
    match phase.who {
        "firmware" => "#bab0ac",
        "agent" => "#59a14f",
        _ if phase.name.starts_with("initcall") => "#f28e2b",
        _ => "#4e79a7",
    }
}

/// 1.23 for 1,234,567.
fn millions(count: u64) -> String {
    format!("{:.2}", count as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_follow_each_other() {
        let phase = |name: &str, instructions| Phase {
            who: "kernel",
            name: name.to_owned(),
            instructions,
            kernel: instructions,
        };
        let svg = svg(&[phase("mm", 3_000_000), phase("exec", 1_000_000)]);
        assert!(
            svg.contains("4.00 million") && svg.contains(">mm<") && svg.contains(">exec<"),
            "{svg}"
        );
        // 610 wide: the second begins where three quarters of it end.
        assert!(
            svg.contains("x=\"270.0\"") && svg.contains("x=\"727.5\""),
            "{svg}"
        );
    }
}
