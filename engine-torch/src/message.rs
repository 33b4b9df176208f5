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

/// Why libtorch could not read a file, told from what it misses in it.
pub(crate) fn unreadable(said: &str) -> String {
    if said.contains("constants.pkl") {
        "it is what torch.save wrote, not TorchScript; write it with torch.jit.save(torch.jit.script(model))".to_owned()
    } else if said.contains("reading zip archive") {
        // Also what the former format of torch.save is, a pickle, or half of a file.
        "it is no TorchScript file, or a part of one; write it with torch.jit.save(torch.jit.script(model))".to_owned()
    } else {
        brief(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_torchscript_is_told_by_what_it_lacks() {
        let of =
            |found: &str| unreadable(&format!("PytorchStreamReader failed {found}. This is an internal miniz error."));
        assert!(of("locating file constants.pkl: file not found").starts_with("it is what torch.save wrote"));
        for found in ["not a ZIP archive", "failed finding central directory"] {
            assert!(of(&format!("reading zip archive: {found}")).starts_with("it is no TorchScript file"), "{found}");
        }
        assert_eq!(unreadable("it has no method `forward`"), "it has no method `forward`");
    }
}
