//! Finds the comments of a file: where `//` or `/*` stands outside of strings.

use super::facts::Place;

/// The lines that hold a comment, with the columns of the whole line.
pub fn lines(text: &str) -> Vec<Place> {
    let mut found = Vec::new();
    let mut state = State::Code;
    for (number, line) in text.lines().enumerate() {
        let (comment, next) = scan(line, state);
        state = next;
        if comment {
            found.push(Place {
                name: "comment".into(),
                line: number + 1,
                size: line.chars().count(),
                test: false,
            });
        }
    }
    found
}

/// What a line begins inside of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    /// A string, and how many `#` end it. An ordinary string can escape its end.
    Text {
        hashes: Option<usize>,
    },
    /// Comments between `/*` and `*/`, which nest.
    Block(usize),
}

/// Whether the line has a comment, and what the next line begins inside of.
fn scan(line: &str, mut state: State) -> (bool, State) {
    let mut rest = line;
    let mut comment = matches!(state, State::Block(_));
    let mut before = ' ';
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        match state {
            State::Block(depth) if rest.starts_with("/*") => {
                (state, length) = (State::Block(depth + 1), 2);
            }
            State::Block(depth) if rest.starts_with("*/") => {
                state = if depth == 1 {
                    State::Code
                } else {
                    State::Block(depth - 1)
                };
                length = 2;
            }
            State::Block(_) => {}
            State::Text { hashes: None } if first == '\\' => {
                length += rest[length..].chars().next().map_or(0, char::len_utf8);
            }
            State::Text { hashes: None } if first == '"' => state = State::Code,
            State::Text {
                hashes: Some(hashes),
            } if first == '"' && rest[1..].starts_with(&"#".repeat(hashes)) => {
                (state, length) = (State::Code, 1 + hashes);
            }
            State::Text { .. } => {}
            State::Code if rest.starts_with("//") => return (true, State::Code),
            State::Code if rest.starts_with("/*") => {
                (state, comment, length) = (State::Block(1), true, 2);
            }
            State::Code if first == '"' => state = State::Text { hashes: None },
            State::Code if first == 'r' && !is_name(before) || raw_bytes(rest, before) => {
                if let Some((hashes, quote)) = raw(rest) {
                    (state, length) = (
                        State::Text {
                            hashes: Some(hashes),
                        },
                        quote,
                    );
                }
            }
            State::Code if first == '\'' => length = character(rest),
            State::Code => {}
        }
        before = first;
        rest = &rest[length..];
    }
    (comment, state)
}

fn is_name(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

fn raw_bytes(rest: &str, before: char) -> bool {
    !is_name(before) && (rest.starts_with("br") || rest.starts_with("cr"))
}

/// The `#`s of a raw string that begins here, and how long its beginning is.
fn raw(rest: &str) -> Option<(usize, usize)> {
    let start = rest.find('r')? + 1;
    let hashes = rest[start..]
        .bytes()
        .take_while(|byte| *byte == b'#')
        .count();
    let quote = start + hashes;
    rest[quote..]
        .starts_with('"')
        .then_some((hashes, quote + 1))
}

/// How long a character literal is; one for a lifetime's mark.
fn character(rest: &str) -> usize {
    let mut inside = rest[1..].chars();
    match inside.next() {
        Some('\\') => rest[3..].find('\'').map_or(1, |end| end + 4),
        Some(only) if inside.next() == Some('\'') => only.len_utf8() + 2,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::lines;

    fn found(text: &str) -> Vec<usize> {
        lines(text).iter().map(|place| place.line).collect()
    }

    #[test]
    fn a_comment_is_one_only_outside_of_strings() {
        let code =
            "let a = \"//\"; // yes\nlet b = r#\"\" // no\n // no \"#; // yes\n'\"'; \"// no\";";
        assert_eq!(found(code), [1, 3]);
    }

    #[test]
    fn a_block_lasts_until_its_end() {
        assert_eq!(found("/* a\nb /* c */\n*/ d\ne"), [1, 2, 3]);
    }

    #[test]
    fn escapes_lifetimes_and_raw_names_begin_no_string() {
        assert_eq!(
            found("'\\''; \"\\\"//\"; fn f<'a>(r: &'a str) {} // yes"),
            [1]
        );
        assert_eq!(
            found("bar(\"//\"); r#type(); br\"//\"; '\\u{2f}';\n\"a\\\n//\""),
            [0; 0]
        );
    }
}
