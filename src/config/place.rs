//! Places in files, and problems told with them: `file:line:column`, the line itself, a caret, a remedy.
//!
//! Invariant: lines and columns count characters from 1, and a problem can be shown whatever bytes the file
//! holds: the excerpt is one line, bounded, and free of control characters.

use std::fmt;
use std::path::{Path, PathBuf};

/// Problems shown in a report; the others are only counted.
const SHOWN_MAX: usize = 100;
/// Characters of a source line that are shown.
const EXCERPT_MAX: usize = 140;
/// Characters shown before the place when the line is longer than that.
const EXCERPT_BEFORE: usize = 60;

/// A stretch of one file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    /// Which of the files, in the order they were read.
    pub(super) file: usize,
    /// First byte.
    pub(super) start: usize,
    /// One past the last byte.
    pub(super) end: usize,
}

/// One file's text, and where its lines begin.
pub(super) struct Source {
    /// The path as problems name it.
    pub(super) path: PathBuf,
    /// The text, without a byte order mark.
    pub(super) text: String,
    line_starts: Vec<usize>,
}

impl Source {
    pub(super) fn new(path: &Path, text: &str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).to_owned();
        let after_breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        let line_starts = std::iter::once(0).chain(after_breaks).collect();
        Source { path: path.to_owned(), text, line_starts }
    }

    /// Number of the line that holds this byte, from 0.
    pub(super) fn line_of(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset).saturating_sub(1)
    }

    /// The text of a line (from 0) without its line break, and where it begins.
    pub(super) fn line(&self, number: usize) -> (usize, &str) {
        let start = self.line_starts.get(number).copied().unwrap_or(self.text.len());
        let end = self.line_starts.get(number + 1).copied().unwrap_or(self.text.len());
        (start, self.text[start..end].trim_end_matches(['\n', '\r']))
    }

    /// The text of a place; empty where the place does not fit this file.
    pub(super) fn text_of(&self, place: Place) -> &str {
        self.text.get(place.start..place.end).unwrap_or_default()
    }

    /// `file:line:column` of a place, to name it in another problem's message.
    pub(super) fn name_of(&self, place: Place) -> String {
        let spot = self.spot(place);
        format!("{}:{}:{}", self.path.display(), spot.line, spot.column)
    }

    /// Line, column and excerpt of a place.
    pub(super) fn spot(&self, place: Place) -> Spot {
        let number = self.line_of(place.start);
        let (line_start, line) = self.line(number);
        let before = chars_within(line, place.start.saturating_sub(line_start));
        let through = chars_within(line, place.end.saturating_sub(line_start));
        let skipped =
            if line.chars().count() > EXCERPT_MAX { before.saturating_sub(EXCERPT_BEFORE) } else { 0 };
        let excerpt = shown(line).chars().skip(skipped).take(EXCERPT_MAX).collect::<String>();
        let room = (skipped + EXCERPT_MAX).saturating_sub(before);
        Spot {
            line: number + 1,
            column: before + 1,
            width: through.saturating_sub(before).min(room).max(1),
            excerpt,
            caret: before - skipped,
        }
    }
}

/// How many characters of `line` begin within its first `bytes` bytes.
fn chars_within(line: &str, bytes: usize) -> usize {
    line.char_indices().take_while(|(at, _)| *at < bytes).count()
}

/// Tabs become one space, so that the caret stands right; other control characters never reach a terminal.
fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        control if control.is_control() => char::REPLACEMENT_CHARACTER,
        other => other,
    }
}

/// The text with passwords replaced by as many stars (P10): a report ends in the journal. Covers what people
/// write by mistake, `password = "..."`, also misspelt, and `://user:password@host`; fieldpost itself knows no inline secret.
pub(super) fn masked(text: &str) -> String {
    let mut out = text.chars().collect::<Vec<_>>();
    mask_assignments(&mut out);
    mask_user_info(&mut out);
    out.into_iter().collect()
}

fn mask_assignments(text: &mut [char]) {
    let padding = |c: &char| matches!(c, ' ' | '\t' | '"' | '\'');
    for sign in 0..text.len() {
        if text[sign] != '=' {
            continue;
        }
        let before = text[..sign].iter().rev().skip_while(|c| padding(c));
        let name: Vec<char> =
            before.take_while(|c| c.is_alphanumeric() || matches!(c, '_' | '-')).copied().collect();
        if is_secret(&name.into_iter().rev().collect::<String>().to_lowercase()) {
            for character in text[sign + 1..].iter_mut().skip_while(|c| padding(c)) {
                *character = '*';
            }
            return;
        }
    }
}

/// Whether what is called so is probably a password, also when the word is misspelt. A file's name is none.
fn is_secret(name: &str) -> bool {
    const WORDS: [&str; 5] = ["pass", "pwd", "secret", "token", "credential"];
    let near = |word: &str, far: usize| strsim::damerau_levenshtein(name, word) <= far;
    let said = WORDS.iter().any(|word| name.contains(word)) || near("password", 2) || near("secret", 1);
    said && !name.ends_with("_file")
}

fn mask_user_info(text: &mut [char]) {
    let Some(start) = text.windows(3).position(|window| window == [':', '/', '/']).map(|at| at + 3) else {
        return;
    };
    let Some(end) = text[start..].iter().rposition(|c| *c == '@').map(|n| start + n) else { return };
    text[start..end].fill('*');
}

/// A text as it may be shown: one line, no control characters, no passwords.
pub(super) fn shown(text: &str) -> String {
    masked(text).chars().map(printable).collect()
}

/// A place as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// How many characters it is wide, at least 1.
    pub width: usize,
    /// The source line, at most 140 characters of it.
    pub excerpt: String,
    /// Characters of the excerpt before the place.
    pub caret: usize,
}

/// One thing wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file it is in.
    pub file: PathBuf,
    /// Where in the file; `None` when the file could not be read at all.
    pub spot: Option<Spot>,
    /// What is wrong.
    pub message: String,
    /// What to write instead, or what to try, where there is a remedy.
    pub help: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        match &self.spot {
            None => write!(f, " {}", self.message)?,
            Some(spot) => {
                write!(f, "{}:{}: {}", spot.line, spot.column, self.message)?;
                if !spot.excerpt.trim().is_empty() {
                    writeln!(f, "\n    {}", spot.excerpt.trim_end())?;
                    write!(f, "    {:caret$}{:^<width$}", "", "", caret = spot.caret, width = spot.width)?;
                }
            }
        }
        match &self.help {
            Some(help) => write!(f, "\n    help: {help}"),
            None => Ok(()),
        }
    }
}

/// Everything wrong with a configuration, in the order of its places; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    /// The whole report, ending with `N problems in FILE`. At most 100 problems are shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in self.0.iter().take(SHOWN_MAX) {
            writeln!(f, "{problem}\n")?;
        }
        if self.0.len() > SHOWN_MAX {
            writeln!(f, "... and {} more\n", self.0.len() - SHOWN_MAX)?;
        }
        let mut files = self.0.iter().map(|problem| problem.file.as_path()).collect::<Vec<_>>();
        files.sort_unstable();
        files.dedup();
        let noun = if self.0.len() == 1 { "problem" } else { "problems" };
        write!(f, "{} {noun} in ", self.0.len())?;
        match files.as_slice() {
            [file] => write!(f, "{}", file.display()),
            _ => write!(f, "{} files", files.len()),
        }
    }
}

impl std::error::Error for Problems {}

#[cfg(test)]
mod tests {
    use super::*;

    fn spot(text: &str, start: usize, end: usize) -> Spot {
        Source::new(Path::new("f.toml"), text).spot(Place { file: 0, start, end })
    }

    #[test]
    fn columns_count_characters_and_not_bytes() {
        let text = "a = 1\r\nµµ = \"x\"\n";
        let at = text.find("\"x\"").expect("it is there");
        let spot = spot(text, at, at + 3);
        assert_eq!((spot.line, spot.column, spot.width, spot.caret), (2, 6, 3, 5));
        assert_eq!(spot.excerpt, "µµ = \"x\"");
    }

    #[test]
    fn a_place_past_the_end_or_inside_a_character_is_still_a_place() {
        for text in ["", "\n", "a", "µ", "x = \"\u{1b}[31m\"\n"] {
            for start in 0..=text.len() + 3 {
                for end in 0..=text.len() + 3 {
                    let spot = spot(text, start, end);
                    assert!(spot.width >= 1 && spot.line >= 1 && spot.column >= 1);
                    assert!(!spot.excerpt.chars().any(char::is_control));
                }
            }
        }
    }

    #[test]
    fn a_long_line_is_shown_around_the_place() {
        let text = format!("{}HERE{}", "a".repeat(1000), "b".repeat(1000));
        let spot = spot(&text, 1000, 1004);
        assert_eq!(spot.excerpt.chars().count(), EXCERPT_MAX);
        assert_eq!(spot.excerpt.chars().skip(spot.caret).take(spot.width).collect::<String>(), "HERE");
        assert_eq!(spot.column, 1001);
    }

    #[test]
    fn passwords_are_not_repeated() {
        for (line, shown) in [
            ("password = \"hunter2\"", "password = \"********"),
            ("  PASS=hunter2 # x", "  PASS=***********"),
            ("url = \"mqtt://me:hunter2@host\"", "url = \"mqtt://**********@host\""),
            ("password_file = \"broker.password\"", "password_file = \"broker.password\""),
            ("bypass and pass", "bypass and pass"),
            ("pasword = \"hunter2\"", "pasword = \"********"),
            ("a = 1, \"Paswort\" = 'x'", "a = 1, \"Paswort\" = '**"),
            ("api_token=hunter2", "api_token=*******"),
            ("address = 5", "address = 5"),
        ] {
            assert_eq!(masked(line), shown);
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_column() {
        assert_eq!(spot("\u{feff}x = 1", 0, 1).column, 1);
        assert_eq!(spot("\u{feff}x = 1", 0, 1).excerpt, "x = 1");
    }
}
