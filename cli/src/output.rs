//! Standard output for commands whose output is their result.

use std::io::{IsTerminal as _, Write as _};

use crate::error::Error;

/// Prints text as it is.
///
/// # Errors
/// [`Error::Output`]; a reader that has gone (`| head`) is not an error worth a message.
pub fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Error::Output)
}

/// The same of work that goes on whether or not anybody reads of it.
///
/// # Errors
/// As [`print`], but for a reader that has gone.
pub fn print_as_it_goes(text: &str) -> Result<(), Error> {
    match print(text) {
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

/// Whether colours on standard error would be seen, and are not declined (no-color.org).
pub fn colours() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Rows as text columns: each as wide as its widest cell, two spaces apart, nothing after the last.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Every line two spaces further to the right.
pub fn indent(text: &str) -> String {
    text.lines().flat_map(|line| ["  ", line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_with_their_text() {
        let rows = [
            vec!["a".to_owned(), "long".to_owned(), "x".to_owned()],
            vec!["bcd".to_owned(), "e".to_owned(), String::new()],
        ];
        assert_eq!(table(&rows), "a    long  x\nbcd  e\n");
    }
}
