//! The report's pictures as inline SVG. Colours are classes, so that the page's style sheet rules light and dark.

use std::fmt::Write as _;

use super::escape;

/// A curve: `(step, value)` in order of the step.
pub(super) type Points = Vec<(f64, f64)>;

/// More points than this say nothing more on a screen and only make the page heavy.
const MAX_POINTS: usize = 300;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 240.0;
/// Room for the axis labels: left, right, top, bottom.
const MARGIN: [f64; 4] = [52.0, 12.0, 12.0, 30.0];

/// A curve over training steps, with the vertical axis from zero to `top`, or to the largest value.
pub(super) fn curve(label: &str, points: &[(f64, f64)], top: Option<f64>) -> String {
    let points = thin_out(points);
    let last_step = points.last().map_or(1.0, |point| point.0).max(1.0);
    let largest = points.iter().map(|point| point.1).fold(0.0, f64::max);
    let top = top.unwrap_or_else(|| nice_at_least(largest));
    let [left, right, above, below] = MARGIN;
    let x = |step: f64| left + step / last_step * (WIDTH - left - right);
    let y = |value: f64| HEIGHT - below - (value / top).clamp(0.0, 1.0) * (HEIGHT - above - below);

    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{}">"#, escape(label));
    for part in 0..=4 {
        let value = top * f64::from(part) / 4.0;
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{left}" x2="{0}" y1="{1:.1}" y2="{1:.1}"/><text class="tick" x="{2}" y="{3:.1}" text-anchor="end">{4}</text>"#,
            WIDTH - right,
            y(value),
            left - 8.0,
            y(value) + 4.0,
            trim(value),
        );
        let step = last_step * f64::from(part) / 4.0;
        let anchor = if part == 4 { "end" } else { "middle" };
        let _ = write!(
            svg,
            r#"<text class="tick" x="{:.1}" y="{}" text-anchor="{anchor}">{:.0}</text>"#,
            x(step),
            HEIGHT - 8.0,
            step,
        );
    }
    let path: Vec<String> = points.iter().map(|&(step, value)| format!("{:.1},{:.1}", x(step), y(value))).collect();
    let _ = write!(svg, r#"<polyline class="curve" points="{}"/></svg>"#, path.join(" "));
    svg
}

/// A confusion matrix: rows are expected answers, columns given ones; shade is the share of the row.
pub(super) fn confusion(labels: &[String], counts: &[Vec<u64>]) -> String {
    const CELL: f64 = 36.0;
    const LABELS: f64 = 84.0;
    let side = LABELS + CELL * labels.len() as f64;
    let mut svg = format!(
        r#"<svg viewBox="0 0 {side} {side}" role="img" aria-label="Confusion matrix: rows expected, columns given">"#
    );
    for (index, label) in labels.iter().enumerate() {
        let middle = LABELS + CELL * (index as f64 + 0.5);
        let label = escape(label);
        let _ = write!(
            svg,
            r#"<text class="tick" x="{}" y="{}" text-anchor="end">{label}</text><text class="tick" transform="translate({} {}) rotate(-60)">{label}</text>"#,
            LABELS - 6.0,
            middle + 4.0,
            middle + 4.0,
            LABELS - 6.0,
        );
    }
    for (row, given) in counts.iter().enumerate() {
        let total: u64 = given.iter().sum();
        for (column, &count) in given.iter().enumerate().filter(|(_, count)| **count > 0) {
            let share = count as f64 / total as f64;
            let (x, y) = (LABELS + CELL * column as f64, LABELS + CELL * row as f64);
            let class = if row == column { "right" } else { "wrong" };
            // Rare mistakes are what one looks for here: no cell with a count is fainter than this.
            let opacity = 0.15 + 0.85 * share;
            let _ = write!(
                svg,
                r#"<rect class="{class}" x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill-opacity="{opacity:.2}"/><text class="count" x="{}" y="{}" text-anchor="middle">{count}</text>"#,
                x + CELL / 2.0,
                y + CELL / 2.0 + 4.0,
            );
        }
    }
    svg.push_str("</svg>");
    svg
}

/// Horizontal bars of fractions between zero and one, such as accuracies.
pub(super) fn bars(label: &str, rows: &[(&str, f64)]) -> String {
    const ROW: f64 = 34.0;
    const LABELS: f64 = 110.0;
    const VALUES: f64 = 70.0;
    let height = ROW * rows.len() as f64;
    let mut svg = format!(r#"<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">"#, escape(label));
    for (index, (name, value)) in rows.iter().enumerate() {
        let y = ROW * index as f64;
        let full = WIDTH - LABELS - VALUES;
        let length = value.clamp(0.0, 1.0) * full;
        let _ = write!(
            svg,
            r#"<text class="tick" x="{}" y="{}" text-anchor="end">{}</text><rect class="track" x="{LABELS}" y="{}" width="{full}" height="18"/><rect class="bar" x="{LABELS}" y="{}" width="{length:.1}" height="18"/><text class="tick" x="{}" y="{}">{value:.4}</text>"#,
            LABELS - 8.0,
            y + 21.0,
            escape(name),
            y + 8.0,
            y + 8.0,
            LABELS + full + 8.0,
            y + 21.0,
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Means over equal runs of points, at most [`MAX_POINTS`] of them. The last point stays as it is.
fn thin_out(points: &[(f64, f64)]) -> Points {
    let run = points.len().div_ceil(MAX_POINTS).max(1);
    let mut thin: Points = points
        .chunks(run)
        .map(|chunk| {
            let n = chunk.len() as f64;
            (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
        })
        .collect();
    if let (Some(thin_last), Some(last)) = (thin.last_mut(), points.last()) {
        *thin_last = *last;
    }
    thin
}

/// The smallest of 1, 2, 4 or 8 times a power of ten that is not below `value`: its quarters are short numbers.
fn nice_at_least(value: f64) -> f64 {
    if !value.is_finite() || value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 4.0, 8.0, 10.0].into_iter().map(|step| step * power).find(|top| *top >= value).unwrap_or(value)
}

fn trim(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ends_at_a_round_number_not_below_the_data() {
        for (value, top) in [(0.17, 0.2), (2.56, 4.0), (0.9, 1.0), (81.0, 100.0), (0.0, 1.0), (f64::NAN, 1.0)] {
            assert!((nice_at_least(value) - top).abs() < 1e-12, "{value} gives {}", nice_at_least(value));
        }
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_last_point() {
        let points: Points = (1..=1500).map(|step| (f64::from(step), 1.0)).collect();
        let thin = thin_out(&points);
        assert!(thin.len() <= MAX_POINTS);
        assert_eq!(thin.last(), points.last());
        assert_eq!(thin_out(&points[..10]), points[..10]);
    }

    #[test]
    fn an_empty_curve_is_still_a_picture() {
        assert!(curve("loss", &[], None).starts_with("<svg"));
    }
}
