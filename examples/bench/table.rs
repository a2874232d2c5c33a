//! The table: figures in, medians and ratios out, as text, as markdown, as JSON.
//!
//! Pure. Invariant: nothing is shown that was not measured; what is missing stands there with its reason.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// Which way a figure is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// What stands beside our figures.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Peer {
    /// It was measured in the same run, each figure right before or after ours at the same index.
    Measured {
        /// What it is.
        name: String,
        /// One figure a repeat, in the row's unit.
        figures: Vec<f64>,
    },
    /// It could not be measured here: what it is, why not, and what to install.
    Missing(String),
    /// There is nothing fair to set beside it.
    None,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// Short and unlike all others, as programs want it: `forward-1-throughput`.
    pub(crate) name: &'static str,
    /// What is measured, for people.
    pub(crate) what: String,
    /// Of every figure: `msg/s`, `MB`, `s`, `B/msg`.
    pub(crate) unit: &'static str,
    /// Which way is good.
    pub(crate) better: Better,
    /// One figure a repeat.
    pub(crate) ours: Vec<f64>,
    /// What stands beside them.
    pub(crate) peer: Peer,
    /// What the design asks for, in its words.
    pub(crate) aim: &'static str,
    /// Windows, limits, payloads, what is durable: without these the figures say nothing.
    pub(crate) conditions: String,
}

/// The figure in the middle, or the mean of the two; `None` of nothing.
pub(crate) fn median(figures: &[f64]) -> Option<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len() % 2 == 1 { Some(upper) } else { Some((sorted[middle - 1] + upper) / 2.0) }
}

impl Row {
    /// Median of ours divided by theirs, pair by pair; `None` where there are no pairs, or the peer's figure is 0.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let Peer::Measured { figures, .. } = &self.peer else { return None };
        if figures.len() != self.ours.len() || figures.contains(&0.0) {
            return None;
        }
        median(&self.ours.iter().zip(figures).map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
    }

    fn peer_words(&self) -> String {
        match &self.peer {
            Peer::Measured { name, figures } => format!("{name} {}", cell(figures)),
            Peer::Missing(reason) => reason.clone(),
            Peer::None => "-".to_owned(),
        }
    }

    fn cells(&self) -> [String; 6] {
        [
            self.what.clone(),
            self.unit.to_owned(),
            cell(&self.ours),
            self.peer_words(),
            self.ratio().map_or("-".to_owned(), |ratio| format!("{} x", number(ratio))),
            self.aim.to_owned(),
        ]
    }

    fn json(&self) -> Value {
        let peer = match &self.peer {
            Peer::Measured { name, figures } => {
                json!({ "name": name, "figures": figures, "median": median(figures) })
            }
            Peer::Missing(reason) => json!({ "missing": reason }),
            Peer::None => Value::Null,
        };
        json!({
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "better": if self.better == Better::Higher { "higher" } else { "lower" },
            "ours": { "figures": self.ours, "median": median(&self.ours) },
            "peer": peer,
            "ratio": self.ratio(),
            "aim": self.aim,
            "conditions": self.conditions,
        })
    }
}

/// Everything that was measured, and what could not be.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Table {
    /// The machine and the versions, a line each.
    pub(crate) about: Vec<String>,
    /// In the order of measuring.
    pub(crate) rows: Vec<Row>,
    /// The row that failed, and why.
    pub(crate) failures: Vec<(&'static str, String)>,
}

const HEADINGS: [&str; 6] = ["", "unit", "fieldpost", "peer", "ratio", "aim"];

impl Table {
    /// Columns that line up, then the conditions of each row.
    pub(crate) fn text(&self) -> String {
        let lines: Vec<[String; 6]> =
            [HEADINGS.map(str::to_owned)].into_iter().chain(self.rows.iter().map(Row::cells)).collect();
        let widths = [0, 1, 2, 3, 4, 5]
            .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0));
        let mut text = self.about.iter().map(|line| format!("{line}\n")).collect::<String>() + "\n";
        for line in &lines {
            let padded = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
            let _ = writeln!(text, "{}", padded.collect::<Vec<_>>().join("  ").trim_end());
        }
        let _ = writeln!(text, "\nMedian (least to most) of paired repeats; the ratio is ours to theirs.");
        text + &self.notes("  ")
    }

    /// The same for a document.
    pub(crate) fn markdown(&self) -> String {
        let mut text = self.about.iter().map(|line| format!("{line}\n")).collect::<String>() + "\n";
        let mut line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        };
        line(&HEADINGS.map(str::to_owned));
        line(&HEADINGS.map(|_| "---".to_owned()));
        for row in &self.rows {
            line(&row.cells());
        }
        let _ = writeln!(text, "\nMedian (least to most) of paired repeats; the ratio is ours to theirs.\n");
        text + &self.notes("- ")
    }

    /// What holds for several rows in a row is said once.
    fn notes(&self, mark: &str) -> String {
        let alike = self.rows.chunk_by(|one, next| one.conditions == next.conditions);
        let conditions = alike.filter_map(|rows| {
            let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
            Some(format!("{mark}{}: {}\n", names.join(", "), rows.first()?.conditions))
        });
        let failures =
            self.failures.iter().map(|(name, why)| format!("{mark}{name} was not measured: {why}\n"));
        conditions.chain(failures).collect()
    }

    /// The same for programs, with every single figure.
    pub(crate) fn json(&self) -> Value {
        let failures = self.failures.iter().map(|(name, reason)| json!({ "name": name, "reason": reason }));
        json!({
            "about": self.about,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "failures": failures.collect::<Vec<_>>(),
        })
    }
}

/// The median, and the range when there is one.
fn cell(figures: &[f64]) -> String {
    let Some(middle) = median(figures) else { return "-".to_owned() };
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let most = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if figures.len() == 1 {
        return number(middle);
    }
    format!("{} ({} to {})", number(middle), number(least), number(most))
}

/// Three digits that count, and thousands apart.
fn number(figure: f64) -> String {
    let digits = match figure.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 => 2,
        size if size >= 0.0995 => 3,
        0.0 => 0,
        _ => 4,
    };
    let text = format!("{figure:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let (sign, whole) = whole.split_at(usize::from(whole.starts_with('-')));
    let groups: Vec<&str> = whole
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or_default())
        .collect();
    format!("{sign}{}{rest}", groups.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: &[f64], peer: Peer) -> Row {
        Row {
            name: "forward-1",
            what: "forward".to_owned(),
            unit: "msg/s",
            better: Better::Higher,
            ours: ours.to_vec(),
            peer,
            aim: ">= 1.2 x",
            conditions: "200 B".to_owned(),
        }
    }

    fn bridge(figures: &[f64]) -> Peer {
        Peer::Measured { name: "bridge".to_owned(), figures: figures.to_vec() }
    }

    #[test]
    fn the_median_is_the_one_in_the_middle_or_between_the_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }

    #[test]
    fn the_ratio_is_taken_pair_by_pair_and_never_where_a_pair_is_missing() {
        // 2, 3 and 0.5; the ratio of the medians would be 1.
        assert_eq!(row(&[2.0, 30.0, 5.0], bridge(&[1.0, 10.0, 10.0])).ratio(), Some(2.0));
        assert_eq!(row(&[2.0, 30.0], bridge(&[1.0])).ratio(), None);
        assert_eq!(row(&[], bridge(&[])).ratio(), None);
        assert_eq!(row(&[2.0], bridge(&[0.0])).ratio(), None);
        assert_eq!(row(&[2.0], Peer::Missing("not installed".to_owned())).ratio(), None);
    }

    #[test]
    fn figures_have_three_digits_that_count_and_thousands_apart() {
        for (figure, text) in [
            (1_234_567.8, "1 234 568"),
            (1000.0, "1 000"),
            (999.4, "999"),
            (99.96, "100"),
            (12.34, "12.3"),
            (1.234, "1.23"),
            (0.1234, "0.123"),
            (0.012_34, "0.0123"),
            (-1234.0, "-1 234"),
            (0.0, "0"),
        ] {
            assert_eq!(number(figure), text);
        }
    }

    #[test]
    fn all_three_forms_say_what_is_missing_and_why() {
        let missing = Peer::Missing("mosquitto: not installed".to_owned());
        let failures = vec![("disk", "the disk is full".to_owned())];
        let rows = vec![row(&[5.0, 7.0, 6.0], bridge(&[2.0, 2.0, 3.0])), row(&[1.0], missing)];
        let table = Table { about: vec!["2 cores".to_owned()], rows, failures };
        for text in [table.text(), table.markdown(), table.json().to_string()] {
            for words in ["2 cores", "mosquitto: not installed", "the disk is full", "200 B"] {
                assert!(text.contains(words), "{words:?} is missing in\n{text}");
            }
        }
        assert!(table.text().contains("6.00 (5.00 to 7.00)"), "{}", table.text());
        let json = table.json();
        assert_eq!(json["rows"][0]["ours"]["figures"], json!([5.0, 7.0, 6.0]));
        assert_eq!(json["rows"][0]["ratio"], json!(2.5));
        assert_eq!(json["rows"][1]["ratio"], Value::Null);
    }
}
