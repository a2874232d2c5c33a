//! Text in the columns of a terminal, where a Chinese character takes two and an accent none. Pure.
//!
//! Invariant: nothing that is written through here moves the cursor, and a row is never wider than it may be.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// How a word is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Waiting,
    Bad,
    Heading,
}

/// Whether tones become colours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Paint {
    pub(super) colours: bool,
}

impl Paint {
    pub(super) fn dab(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Waiting => "33",
            Tone::Bad => "31;1",
            Tone::Heading => "1",
        };
        if self.colours { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Text from elsewhere (a broker, a device) as it may be shown on a terminal: nothing in it moves the cursor.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Columns that a printable text takes.
pub(super) fn width(text: &str) -> usize {
    text.width()
}

/// With blanks behind it, to so many columns; longer ones stay.
pub(super) fn padded(text: &str, columns: usize) -> String {
    let mut padded = text.to_owned();
    padded.extend(std::iter::repeat_n(' ', columns.saturating_sub(width(text))));
    padded
}

/// With blanks before it, to so many columns; longer ones stay.
pub(super) fn to_the_right(text: &str, columns: usize) -> String {
    let blanks = columns.saturating_sub(width(text));
    " ".repeat(blanks) + text
}

/// At most so many columns; what is cut ends in `…`.
pub(super) fn cut(text: &str, columns: usize) -> String {
    match columns {
        _ if width(text) <= columns => text.to_owned(),
        0 => String::new(),
        _ => beginning(text, columns - 1).to_owned() + "…",
    }
}

/// As much of it as so many columns hold.
fn beginning(text: &str, columns: usize) -> &str {
    let mut taken = 0;
    let too_far = |(_, c): &(usize, char)| {
        taken += c.width().unwrap_or(0);
        taken > columns
    };
    let end = text.char_indices().find(too_far).map_or(text.len(), |(at, _)| at);
    &text[..end]
}

/// In lines of so many columns, broken between words.
pub(super) fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if width(line) + 1 + width(word) <= columns => *line = format!("{line} {word}"),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// One row: pieces of text, each with how it is to be taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Row(Vec<(Option<Tone>, String)>);

impl Row {
    /// Begins with this text.
    pub(super) fn of(text: &str) -> Row {
        Row::default().text(text)
    }

    /// Goes on with this text.
    pub(super) fn text(mut self, text: &str) -> Row {
        self.0.push((None, printable(text)));
        self
    }

    /// Goes on with this text, said so.
    pub(super) fn toned(mut self, tone: Tone, text: &str) -> Row {
        self.0.push((Some(tone), printable(text)));
        self
    }

    /// Goes on at this column, or behind what is there.
    pub(super) fn at(mut self, column: usize) -> Row {
        let blanks = column.saturating_sub(self.width());
        self.0.push((None, " ".repeat(blanks)));
        self
    }

    /// Its columns.
    pub(super) fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| width(text)).sum()
    }

    /// Exactly so many columns, cut or filled with blanks: written over another row it leaves nothing of that.
    pub(super) fn painted(&self, columns: usize, paint: Paint) -> String {
        let is_cut = self.width() > columns;
        let mut left = columns.saturating_sub(usize::from(is_cut));
        let mut painted = String::new();
        for (tone, text) in &self.0 {
            let piece = beginning(text, left);
            left = left.saturating_sub(width(piece));
            match tone {
                Some(tone) if !piece.is_empty() => painted.push_str(&paint.dab(*tone, piece)),
                _ => painted.push_str(piece),
            }
            if piece.len() < text.len() {
                break;
            }
        }
        if is_cut && columns > 0 {
            painted.push('…');
        }
        painted.extend(std::iter::repeat_n(' ', left));
        painted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Paint = Paint { colours: false };

    #[test]
    fn text_from_elsewhere_cannot_move_the_cursor() {
        assert_eq!(printable("quota\u{1b}[2J\nexceeded é"), "quota\u{fffd}[2J\u{fffd}exceeded é");
        let row = Row::of("a\u{1b}[2Jb\tc\u{7f}");
        assert!(!row.painted(40, PLAIN).contains(char::is_control));
    }

    #[test]
    fn columns_are_counted_as_a_terminal_shows_them() {
        for (text, columns) in [("", 0), ("abc", 3), ("冲压线", 6), ("e\u{301}", 1), ("°C", 2), ("🔥", 2)]
        {
            assert_eq!(width(text), columns, "{text}");
        }
        assert_eq!((padded("线1", 5), to_the_right("线1", 5)), ("线1  ".into(), "  线1".into()));
    }

    #[test]
    fn what_does_not_fit_is_cut_and_says_so() {
        for (text, columns, expected) in [
            ("abc", 3, "abc"),
            ("abcd", 3, "ab…"),
            ("abcd", 1, "…"),
            ("abcd", 0, ""),
            ("冲压线", 6, "冲压线"),
            ("冲压线", 5, "冲压…"),
            ("冲压线", 4, "冲…"),
            ("冲压线", 2, "…"),
            ("e\u{301}fg", 2, "e\u{301}…"),
        ] {
            assert_eq!(cut(text, columns), expected, "{text} in {columns}");
        }
    }

    #[test]
    fn lines_are_broken_between_words() {
        assert_eq!(wrapped("the agent is gone", 9), ["the agent", "is gone"]);
        assert_eq!(wrapped("a-long-word it is", 5), ["a-long-word", "it is"]);
    }

    #[test]
    fn a_row_takes_exactly_its_columns_whatever_is_in_it() {
        let rows = [
            Row::default(),
            Row::of("abc").toned(Tone::Bad, "DOWN: 冲压线").text(" and more"),
            Row::of("冲压线冲压线冲压线"),
            Row::of("a").at(12).toned(Tone::Good, "ok"),
            Row::of("0123456789"),
        ];
        for row in &rows {
            for columns in 0..40 {
                let painted = row.painted(columns, PLAIN);
                assert_eq!(width(&painted), columns, "{row:?} in {columns}: {painted:?}");
                let cut = row.width() > columns;
                assert_eq!(painted.contains('…'), cut && columns > 0, "{row:?} in {columns}: {painted:?}");
                let coloured = row.painted(columns, Paint { colours: true });
                assert_eq!(coloured.matches("\x1b[0m").count() * 2, coloured.matches('\x1b').count());
            }
        }
        assert_eq!(rows[3].painted(16, PLAIN), "a           ok  ");
    }
}
