//! The URIs that say where a process's output goes: `SCHEME:///PATH?key=value`, percent-encoded.
//!
//! Called by `stdio` and `logger`. Read as containerd's own shim reads them, with Go's `net/url`:
//! what follows a `?` is no part of the path, and what is wrongly encoded is no URI.

use std::path::PathBuf;

/// The path and the query's keys and values in a row; none if it has not this scheme or no absolute
/// path.
pub fn parse(uri: &str, scheme: &str) -> Option<(PathBuf, Vec<String>)> {
    let rest = uri.strip_prefix(scheme)?.strip_prefix("://")?;
    let (rest, _) = rest.split_once('#').unwrap_or((rest, ""));
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = unescape(path, false).filter(|path| path.starts_with('/'))?;
    let mut words = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        for part in [key, value] {
            let part = unescape(part, true)?;
            // A key without a value is a word of its own.
            if !part.is_empty() {
                words.push(part);
            }
        }
    }
    Some((path.into(), words))
}

/// Undoes the percent encoding; in a query `+` is a space.
fn unescape(text: &str, query: bool) -> Option<String> {
    let mut bytes = text.bytes();
    let mut plain = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                if !digits.iter().all(u8::is_ascii_hexdigit) {
                    return None;
                }
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    String::from_utf8(plain).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_becomes_a_path_and_words() {
        let (path, words) =
            parse("binary:///usr/bin/log?--to=a%20b&quiet&x=1+2", "binary").expect("a URI");
        assert_eq!(path, PathBuf::from("/usr/bin/log"));
        assert_eq!(words, ["--to", "a b", "quiet", "x", "1 2"]);
        let (path, words) = parse("file:///a%23+%C3%B6?b#c", "file").expect("a URI");
        assert_eq!(
            (path, words),
            (PathBuf::from("/a#+ö"), vec!["b".to_owned()])
        );
    }

    #[test]
    fn what_names_no_absolute_path_is_none() {
        for uri in [
            "binary://",
            "binary://log",
            "binary://host/log",
            "file:///log",
            "binary:///%zz",
            "binary:///%+1",
            "binary:///%",
            "binary:///log?%2",
            "binary:///%ff",
            "/log",
        ] {
            assert!(parse(uri, "binary").is_none(), "{uri}");
        }
    }
}
