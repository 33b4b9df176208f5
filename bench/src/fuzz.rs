//! Wrong requests of every kind, made of right ones: the same ones for the same seed.

use serde_json::{Map, Value, json};

/// Numbers without end from a seed (splitmix64: Steele, Lea and Flood, 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 where there is none.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.number() % bound.max(1) as u64) as usize
    }

    /// One of a few things.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.number() as u8).collect()
    }
}

/// Sizes and numbers at which code breaks.
const EDGES: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x00ff_ffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 61,
    i64::MAX as u64,
    u64::MAX,
];

/// A few changes without knowledge of what the bytes mean.
pub fn mangle(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => {
                let more = random.below(64);
                let more = random.bytes(more);
                bytes.splice(at..at, more);
            }
            2 => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            3 => {
                let end = (at + random.below(256)).min(bytes.len());
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            4 => {
                let edge = random.pick(&EDGES).to_be_bytes();
                let width = *random.pick(&[1, 2, 4, 8]);
                bytes.iter_mut().skip(at).zip(&edge[8 - width..]).for_each(|(byte, edge)| *byte = *edge);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
}

/// One field of a protobuf message: its tag, and its value with the length before it.
struct Field {
    tag: u64,
    value: Vec<u8>,
    /// Where the value is bytes, which may be a message.
    inner: Option<Vec<u8>>,
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for place in 0..10 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(7 * place)?;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn write_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn fields(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let mut take = |count: usize| {
            let (value, rest) = bytes.split_at_checked(count)?;
            bytes = rest;
            Some(value.to_vec())
        };
        let (value, inner) = match tag & 7 {
            0 => {
                let number = varint(&mut bytes)?;
                let mut value = Vec::new();
                write_varint(number, &mut value);
                (value, None)
            }
            1 => (take(8)?, None),
            5 => (take(4)?, None),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (inner, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                (Vec::new(), Some(inner.to_vec()))
            }
            _ => return None,
        };
        found.push(Field { tag, value, inner });
    }
    Some(found)
}

fn write(fields: Vec<Field>) -> Vec<u8> {
    let mut out = Vec::new();
    for Field { tag, value, inner } in fields {
        write_varint(tag, &mut out);
        if let Some(inner) = inner {
            write_varint(inner.len() as u64, &mut out);
            out.extend(inner);
        }
        out.extend(value);
    }
    out
}

/// A message of protobuf with a few of its fields, or of those of messages in it, changed in ways that the format knows:
/// left out, repeated, exchanged, of another number or type, of a length that is not theirs, at the edge of their range.
pub fn protobuf(random: &mut Random, message: &[u8]) -> Vec<u8> {
    let Some(mut all) = fields(message).filter(|all| !all.is_empty()) else {
        let mut bytes = message.to_vec();
        mangle(random, &mut bytes);
        return bytes;
    };
    for _ in 0..=random.below(3) {
        if all.is_empty() {
            break;
        }
        let at = random.below(all.len());
        let field = &mut all[at];
        match random.below(9) {
            0 => drop(all.remove(at)),
            1 => {
                let Field { tag, value, inner } = field;
                let again = Field { tag: *tag, value: value.clone(), inner: inner.clone() };
                all.insert(at, again);
            }
            2 => {
                let other = random.below(all.len());
                all.swap(at, other);
            }
            3 => field.tag = (field.tag & 7) | (random.pick(&EDGES) << 3),
            4 => field.tag = (field.tag & !7) | random.below(8) as u64,
            5 => {
                // A length that is not that of what follows.
                let mut value = Vec::new();
                write_varint(*random.pick(&EDGES), &mut value);
                value.extend(field.inner.take().unwrap_or_default());
                field.value = value;
            }
            6 => {
                field.value.clear();
                write_varint(*random.pick(&EDGES), &mut field.value);
            }
            _ => {
                if let Some(inner) = &mut field.inner {
                    *inner = protobuf(random, inner);
                } else {
                    mangle(random, &mut field.value);
                }
            }
        }
    }
    let mut bytes = write(all);
    if random.below(8) == 0 {
        mangle(random, &mut bytes);
    }
    bytes
}

/// A value of JSON with a few of its parts changed, as text that most often is JSON.
pub fn json_text(random: &mut Random, value: &Value) -> Vec<u8> {
    let mut value = value.clone();
    for _ in 0..=random.below(3) {
        change(random, &mut value);
    }
    let mut text = value.to_string().into_bytes();
    match random.below(12) {
        0 => text = [vec![b'['; 1 << random.below(14)], text].concat(),
        1 => text = String::from_utf8_lossy(&text).replace('1', "1e400").into_bytes(),
        2 => text = String::from_utf8_lossy(&text).replace('a', "\\ud800").into_bytes(),
        3 | 4 => mangle(random, &mut text),
        _ => {}
    }
    text
}

fn change(random: &mut Random, value: &mut Value) {
    match value {
        Value::Object(fields) if !fields.is_empty() && random.below(4) > 0 => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = random.pick(&keys);
            match random.below(5) {
                0 => drop(fields.remove(key)),
                1 => drop(fields.insert("x".repeat(1 << random.below(12)), json!(random.number()))),
                _ => fields.get_mut(key).into_iter().for_each(|inner| change(random, inner)),
            }
        }
        Value::Array(items) if !items.is_empty() && random.below(4) > 0 => {
            let at = random.below(items.len());
            match random.below(5) {
                0 => drop(items.remove(at)),
                1 => items.extend(vec![items[at].clone(); random.below(300)]),
                _ => change(random, &mut items[at]),
            }
        }
        other => {
            *other = match random.below(9) {
                0 => Value::Null,
                1 => json!(random.below(2) == 0),
                2 => json!(*random.pick(&EDGES)),
                3 => json!(-(random.number() as i64 / 2)),
                4 => json!(f64::from_bits(random.number())),
                5 => json!("\u{0}\u{ffff}é".repeat(random.below(50))),
                6 => Value::Object(Map::new()),
                7 => json!([[], [null, {}], "FP32"]),
                _ => json!(random.pick(&["FP32", "INT64", "BYTES", "../../x", "", "NaN", "-1"])),
            };
        }
    }
}

/// A request of HTTP/1.1 as it is sent, with its line, its headers and its framing changed.
pub fn http1(random: &mut Random, path: &str, body: &[u8]) -> Vec<u8> {
    let method = *random.pick(&["POST", "POST", "POST", "GET", "PUT", "OPTIONS", "CONNECT", "post", "P\u{0}ST", ""]);
    let path = match random.below(8) {
        0 => format!("{path}/../{path}?a=%00%ff#x"),
        1 => "/".repeat(1 << random.below(14)),
        2 => format!("http://localhost{path}"),
        3 => "*".to_owned(),
        _ => path.to_owned(),
    };
    let version = random.pick(&["HTTP/1.1", "HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", ""]);
    let mut head = vec![format!("{method} {path} {version}"), "host: localhost\r\nconnection: close".to_owned()];
    for _ in 0..random.below(4) {
        let edge = *random.pick(&EDGES);
        head.push(match random.below(10) {
            0 => format!("content-length: {edge}"),
            1 => format!("inference-header-content-length: {edge}"),
            2 => format!("content-encoding: {}", random.pick(&["gzip", "deflate", "br", "gzip, gzip", "\u{1}"])),
            3 => format!("accept-encoding: {}", random.pick(&["gzip", "deflate", "*;q=0", "é"])),
            4 => format!("grpc-timeout: {}", random.pick(&["1n", "99999999H", "-1S", "999999999999m"])),
            5 => format!("traceparent: {}", random.pick(&["00-0-0-0", "", "ff-1234", "\u{ff}"])),
            6 => "expect: 100-continue".to_owned(),
            7 => format!("x-{edge}: {}", "y".repeat(1 << random.below(15))),
            8 => "content-type: application/grpc\r\nte: trailers".to_owned(),
            _ => "upgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__".to_owned(),
        });
    }
    let body = if random.below(4) == 0 {
        head.push("transfer-encoding: chunked".to_owned());
        let length = match random.below(3) {
            0 => format!("{:x}", random.pick(&EDGES)),
            1 => "zz".to_owned(),
            _ => format!("{:x}", body.len()),
        };
        [length.as_bytes(), b"\r\n", body, b"\r\n0\r\n\r\n"].concat()
    } else {
        head.push(format!("content-length: {}", body.len()));
        body.to_vec()
    };
    let mut bytes = [head.join("\r\n").as_bytes(), b"\r\n\r\n", &body].concat();
    if random.below(6) == 0 {
        mangle(random, &mut bytes);
    }
    bytes
}

/// One frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = &(payload.len() as u32).to_be_bytes()[1..];
    [length, &[kind, flags], &stream.to_be_bytes()[..], payload].concat()
}

/// A header without index and without Huffman coding (RFC 7541, section 6.2.2).
fn header(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[text.len().min(126) as u8][..], &text.as_bytes()[..text.len().min(126)]].concat();
    [vec![0], text(name), text(value)].concat()
}

/// A connection of HTTP/2 with a call of gRPC as it is sent, with its frames changed: left out, repeated, exchanged, of
/// other kinds, flags, streams and lengths, or beside others that have no business there.
pub fn http2(random: &mut Random, path: &str, message: &[u8]) -> Vec<u8> {
    let headers = [
        header(":method", "POST"),
        header(":scheme", "http"),
        header(":path", path),
        header(":authority", "localhost"),
        header("content-type", "application/grpc"),
        header("te", "trailers"),
    ]
    .concat();
    let length = (message.len() as u32).to_be_bytes();
    let data = [&[0][..], &length, message].concat();
    let mut frames = vec![frame(4, 0, 0, &[]), frame(1, 4, 1, &headers)];
    frames.extend(data.chunks(16 << 10).map(|piece| frame(0, 0, 1, piece)));
    frames.push(frame(0, 1, 1, &[]));
    for _ in 0..=random.below(4) {
        let at = random.below(frames.len());
        match random.below(10) {
            0 => drop(frames.remove(at)),
            1 => frames.insert(at, frames[at].clone()),
            2 => {
                let other = random.below(frames.len());
                frames.swap(at, other);
            }
            3 => frames[at][3] = random.below(16) as u8,
            4 => frames[at][4] = random.number() as u8,
            5 => {
                let stream = (*random.pick(&EDGES) as u32).to_be_bytes();
                frames[at][5..9].copy_from_slice(&stream);
            }
            6 => {
                let length = random.pick(&EDGES).to_be_bytes();
                frames[at][..3].copy_from_slice(&length[5..]);
            }
            7 => {
                // Settings, resets, pings, farewells, windows and continuations of any content.
                let kind = *random.pick(&[2, 3, 4, 5, 6, 7, 8, 9, 0xfa]);
                let payload = random.below(40);
                let (payload, stream) = (random.bytes(payload), random.below(8) as u32);
                let flags = random.number() as u8;
                let extra = frame(kind, flags, stream, &payload);
                for _ in 0..=random.below(30) {
                    frames.insert(at, extra.clone());
                }
            }
            8 => {
                // Many streams that begin and are given up at once.
                for stream in 0..random.below(100) as u32 {
                    frames.push(frame(1, 4, 3 + 2 * stream, &headers));
                    frames.push(frame(3, 0, 3 + 2 * stream, &8_u32.to_be_bytes()));
                }
            }
            _ => mangle(random, &mut frames[at]),
        }
        if frames.iter().any(|frame| frame.len() < 9) || frames.is_empty() {
            break;
        }
    }
    let mut bytes = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frames.concat()].concat();
    if random.below(10) == 0 {
        mangle(random, &mut bytes);
    }
    bytes
}

/// Bytes that are nothing in particular.
pub fn noise(random: &mut Random) -> Vec<u8> {
    let beginning: &[u8] =
        random.pick::<&[u8]>(&[b"", b"PRI * HTTP/2.0\r\n\r\nSM", b"POST /", b"\x16\x03\x01\x02\x00\x01", b"GET"]);
    let rest = random.below(600);
    [beginning, &random.bytes(rest)].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_requests() {
        let make = || {
            let mut random = Random::new(7);
            let message = [0x0a, 2, b'a', b'b', 0x10, 5];
            let value = json!({"inputs": [{"name": "x", "data": [1, 2, 3]}]});
            (0..200)
                .map(|_| {
                    [
                        protobuf(&mut random, &message),
                        json_text(&mut random, &value),
                        http1(&mut random, "/v2", b"{}"),
                        http2(&mut random, "/x", &message),
                        noise(&mut random),
                    ]
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn a_message_is_taken_apart_and_put_together_again() {
        let message = [0x0a, 2, b'a', b'b', 0x10, 0xac, 0x02, 0x1d, 1, 2, 3, 4];
        assert_eq!(write(fields(&message).unwrap()), message);
    }
}
