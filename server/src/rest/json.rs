//! A JSON reader for requests: one pass over the text, no tree, and `NaN` and `Infinity` as numbers, which Triton reads
//! and Python writes although JSON has no such thing.
//!
//! Nothing recurses: nesting is counted, never followed by the stack, so a body of brackets is an error like any other.

use std::borrow::Cow;

/// Nesting of a value that is skipped, at most: far more than any request has.
const MAX_DEPTH: usize = 64;

/// Where a text stopped being what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the JSON is wrong at byte {offset}: {problem}")]
pub(super) struct JsonError {
    /// Bytes before the problem.
    pub(super) offset: usize,
    /// What should be there, or why it cannot be.
    pub(super) problem: Cow<'static, str>,
}

/// A place in a JSON text.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    text: &'a [u8],
    at: usize,
}

/// A value that is neither object nor array.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    /// As it is written; `NaN`, `Infinity` and `-Infinity` included.
    Number(&'a str),
    Text(Cow<'a, str>),
}

impl<'a> Reader<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self { text, at: 0 }
    }

    /// Bytes of the text before this place.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// An error at this place.
    pub(super) fn error(&self, problem: impl Into<Cow<'static, str>>) -> JsonError {
        JsonError { offset: self.at, problem: problem.into() }
    }

    /// The next byte that is not blank; 0 at the end.
    pub(super) fn peek(&mut self) -> u8 {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.get(self.at) {
            self.at += 1;
        }
        self.text.get(self.at).copied().unwrap_or(0)
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == byte && self.at < self.text.len();
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8, wanted: &'static str) -> Result<(), JsonError> {
        if self.take(byte) { Ok(()) } else { Err(self.error(wanted)) }
    }

    /// The text must end here.
    pub(super) fn end(&mut self) -> Result<(), JsonError> {
        self.peek();
        if self.at == self.text.len() { Ok(()) } else { Err(self.error("the text should end here")) }
    }

    /// Reads an object; `field` is given each key and must read its value.
    pub(super) fn object<E: From<JsonError>>(
        &mut self,
        mut field: impl FnMut(&mut Self, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        self.expect(b'{', "an object, `{`, should begin here")?;
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            let key = self.string()?;
            self.expect(b':', "a `:` should follow the key")?;
            field(self, &key)?;
            if self.take(b'}') {
                return Ok(());
            }
            self.expect(b',', "a `,` or the end of the object, `}`, should be here")?;
        }
    }

    /// Reads an array; `element` must read one of its values.
    pub(super) fn array<E: From<JsonError>>(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        self.expect(b'[', "an array, `[`, should begin here")?;
        if self.take(b']') {
            return Ok(());
        }
        loop {
            element(self)?;
            if self.take(b']') {
                return Ok(());
            }
            self.expect(b',', "a `,` or the end of the array, `]`, should be here")?;
        }
    }

    /// Reads an array, or a nest of arrays, whose scalars `element` must read, in order.
    pub(super) fn flattened<E: From<JsonError>>(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        self.expect(b'[', "an array, `[`, should begin here")?;
        let mut depth = 1;
        // After `[` a value or `]` may come, after a value `,` or `]`, after `,` a value.
        let mut after_open = true;
        loop {
            if after_open && self.take(b']') {
                depth -= 1;
            } else if self.take(b'[') {
                if depth == MAX_DEPTH {
                    return Err(self.error("arrays nest too deeply").into());
                }
                depth += 1;
                after_open = true;
                continue;
            } else {
                element(self)?;
            }
            after_open = false;
            while depth > 0 && self.take(b']') {
                depth -= 1;
            }
            if depth == 0 {
                return Ok(());
            }
            self.expect(b',', "a `,` or the end of the array, `]`, should be here")?;
        }
    }

    /// Reads a string.
    pub(super) fn string(&mut self) -> Result<Cow<'a, str>, JsonError> {
        self.expect(b'"', "a string should be here")?;
        let start = self.at;
        let rest = &self.text[start..];
        let Some(length) = rest.iter().position(|&byte| byte == b'"' || byte == b'\\' || byte < b' ') else {
            return Err(self.error("the string has no end"));
        };
        if rest[length] == b'"' {
            let text = str::from_utf8(&rest[..length]).map_err(|_| self.error("the string is not UTF-8"))?;
            self.at += length + 1;
            return Ok(Cow::Borrowed(text));
        }
        self.string_with_escapes(start).map(Cow::Owned)
    }

    /// Leaves escapes to `serde_json`, once the end of the string is found.
    fn string_with_escapes(&mut self, start: usize) -> Result<String, JsonError> {
        let mut end = start;
        loop {
            match self.text.get(end) {
                None => return Err(self.error("the string has no end")),
                Some(b'"') => break,
                Some(b'\\') => end += 2,
                Some(_) => end += 1,
            }
        }
        let text = serde_json::from_slice(&self.text[start - 1..=end]);
        let text = text.map_err(|_| self.error("the string has an escape or a character that JSON does not have"))?;
        self.at = end + 1;
        Ok(text)
    }

    /// Reads a number as it is written.
    pub(super) fn number(&mut self) -> Result<&'a str, JsonError> {
        self.peek();
        let rest = &self.text[self.at..];
        let digits = |from: usize| rest[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let sign = usize::from(rest.first() == Some(&b'-'));
        let whole = digits(sign);
        let mut length = sign + whole;
        if whole == 0 {
            // Triton also reads `Inf`.
            let named = ["NaN", "Infinity", "Inf"].iter().find(|name| rest[sign..].starts_with(name.as_bytes()));
            length += named.ok_or_else(|| self.error("a number should be here"))?.len();
        } else if whole > 1 && rest[sign] == b'0' {
            return Err(self.error("a number does not begin with 0"));
        } else {
            if rest.get(length) == Some(&b'.') {
                let fraction = digits(length + 1);
                if fraction == 0 {
                    return Err(self.error("a number needs a digit behind its point"));
                }
                length += 1 + fraction;
            }
            if let Some(b'e' | b'E') = rest.get(length) {
                let sign = usize::from(matches!(rest.get(length + 1), Some(b'+' | b'-')));
                let exponent = digits((length + 1 + sign).min(rest.len()));
                if exponent == 0 {
                    return Err(self.error("a number needs a digit in its exponent"));
                }
                length += 1 + sign + exponent;
            }
        }
        self.at += length;
        // ASCII: digits, signs, a point, an e, or one of the names.
        str::from_utf8(&rest[..length]).map_err(|_| self.error("a number should be here"))
    }

    /// Reads `true` or `false`.
    pub(super) fn bool(&mut self) -> Result<bool, JsonError> {
        self.peek();
        for (word, value) in [("true", true), ("false", false)] {
            if self.word(word) {
                return Ok(value);
            }
        }
        Err(self.error("`true` or `false` should be here"))
    }

    fn word(&mut self, word: &str) -> bool {
        let found = self.text[self.at..].starts_with(word.as_bytes());
        self.at += if found { word.len() } else { 0 };
        found
    }

    /// Reads whatever is neither object nor array.
    pub(super) fn scalar(&mut self) -> Result<Scalar<'a>, JsonError> {
        match self.peek() {
            b'"' => self.string().map(Scalar::Text),
            b't' | b'f' => self.bool().map(Scalar::Bool),
            b'n' if self.word("null") => Ok(Scalar::Null),
            b'-' | b'0'..=b'9' | b'N' | b'I' => self.number().map(Scalar::Number),
            _ => Err(self.error("a string, number, `true`, `false` or `null` should be here")),
        }
    }

    /// The value that is next, as it is written.
    pub(super) fn raw(&mut self) -> Result<&'a [u8], JsonError> {
        let value = self.skip()?;
        Ok(&value.text[value.at..])
    }

    /// Reads any value and returns a reader of it alone, for later.
    pub(super) fn skip(&mut self) -> Result<Self, JsonError> {
        self.peek();
        let start = self.clone();
        // Closing brackets that are still to come.
        let mut open = Vec::new();
        loop {
            match self.peek() {
                bracket @ (b'[' | b'{') => {
                    if open.len() == MAX_DEPTH {
                        return Err(self.error("values nest too deeply"));
                    }
                    self.at += 1;
                    let close = if bracket == b'[' { b']' } else { b'}' };
                    if !self.take(close) {
                        open.push(close);
                        self.key(&open)?;
                        continue;
                    }
                }
                _ => drop(self.scalar()?),
            }
            loop {
                let Some(&close) = open.last() else {
                    return Ok(Self { text: &self.text[..self.at], at: start.at });
                };
                if self.take(close) {
                    open.pop();
                    continue;
                }
                self.expect(b',', "a `,` or a closing bracket should be here")?;
                self.key(&open)?;
                break;
            }
        }
    }

    /// Reads the key of the next field, inside an object.
    fn key(&mut self, open: &[u8]) -> Result<(), JsonError> {
        if open.last() == Some(&b'}') {
            self.string()?;
            self.expect(b':', "a `:` should follow the key")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn numbers(text: &str) -> Result<Vec<f64>, JsonError> {
        let mut found = Vec::new();
        let mut reader = Reader::new(text.as_bytes());
        reader.flattened(|reader| {
            found.push(reader.number()?.parse().unwrap());
            Ok::<_, JsonError>(())
        })?;
        reader.end()?;
        Ok(found)
    }

    #[test]
    fn nested_arrays_are_read_as_one_row() {
        assert_eq!(numbers(" [ [1, 2.5e1] ,\n[[-3]], [], 4E-1 ] ").unwrap(), [1.0, 25.0, -3.0, 0.4]);
        assert_eq!(numbers("[]").unwrap(), [] as [f64; 0]);
        for wrong in [
            "", "[", "[1", "[1,]", "[1 2]", "[,1]", "[[1]", "[1]]", "[01]", "[1.]", "[.5]", "[+1]", "[1e]", "[-]",
            "[0x1]",
        ] {
            assert!(numbers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_that_json_does_not_have_are_read_as_triton_reads_them() {
        let found = numbers("[NaN, Infinity, -Infinity, Inf]").unwrap();
        assert!(found[0].is_nan());
        assert_eq!(found[1..], [f64::INFINITY, f64::NEG_INFINITY, f64::INFINITY]);
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_stack_overflow() {
        let deep = "[".repeat(1 << 20);
        assert_eq!(numbers(&deep).unwrap_err().problem, "arrays nest too deeply");
        assert_eq!(Reader::new(deep.as_bytes()).skip().unwrap_err().problem, "values nest too deeply");
    }

    #[test]
    fn errors_say_where() {
        assert_eq!(numbers("[1, x]").unwrap_err().to_string(), "the JSON is wrong at byte 4: a number should be here");
    }

    /// Any JSON value.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<i32>().prop_map(|number| Value::from(f64::from(number) / 8.0)),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..6).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_serde_writes_is_skipped_whole(value in value(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
            let mut reader = Reader::new(text.as_bytes());
            let skipped = reader.skip().unwrap();
            prop_assert!(reader.end().is_ok());
            prop_assert_eq!(serde_json::from_slice::<Value>(&skipped.text[skipped.at..]).unwrap(), value);
        }

        #[test]
        fn strings_come_back(text: String) {
            let written = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(Reader::new(written.as_bytes()).string().unwrap(), text);
        }

        #[test]
        fn any_bytes_are_read_or_refused(text in prop::collection::vec(any::<u8>(), 0..64)) {
            // No panic, and what is taken is JSON but for the names of numbers.
            let mut reader = Reader::new(&text);
            if let Ok(skipped) = reader.skip() {
                let taken = &skipped.text[skipped.at..];
                let named = taken.windows(3).any(|word| word == b"NaN" || word == b"Inf");
                prop_assert!(named || serde_json::from_slice::<serde::de::IgnoredAny>(taken).is_ok());
            }
        }
    }
}
