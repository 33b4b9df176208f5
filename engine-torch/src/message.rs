//! What libtorch says, as one sentence.

/// Where libtorch begins to speak of its own insides.
const INSIDES: [&str; 2] = ["Exception raised from ", "frame #0"];

/// The message without the traces around it. An error inside a module comes with the lines of TorchScript that led to
/// it, and ends with `RuntimeError: MESSAGE`, or another class, at the beginning of a line.
pub(crate) fn brief(said: &str) -> String {
    let said = INSIDES.iter().filter_map(|mark| said.find(mark)).min().map_or(said, |end| &said[..end]);
    let is_class = |line: &&str| {
        let class = line.split_once(": ").map_or("", |(class, _)| class);
        let name = class.rsplit('.').next().unwrap_or_default();
        name.ends_with("Error") || name.ends_with("Exception")
    };
    let lines: Vec<&str> = said.lines().collect();
    let start = lines.iter().rposition(is_class).unwrap_or(0);
    let kept = lines[start..].iter().map(|line| line.trim()).filter(|line| !line.is_empty());
    let text = kept.collect::<Vec<_>>().join(" ");
    text.strip_prefix("RuntimeError: ").map_or(text.clone(), str::to_owned)
}
