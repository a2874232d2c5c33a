//! `fieldpost.toml(5)` from the commented configuration file that shows every setting.
//!
//! The file's own order and grouping are the page's. A line is one of four: empty; `# text`; `#key = value`, a setting
//! that may be left out; TOML. Text belongs to what follows it. Invariant: no line is left out.

use clap_mangen::roff::{Inline, Roff, bold, roman};

/// What the page is made of.
#[derive(Debug, PartialEq)]
enum Part {
    /// `[gateway]`
    Table { header: String, text: Vec<String> },
    /// Settings that share their text, each as its lines in the file.
    Settings { settings: Vec<Vec<String>>, text: Vec<String> },
}

/// The page, from the text of the file.
pub(crate) fn page(file: &str, version: &str) -> String {
    let (about, parts) = parts(file);
    let mut page = Roff::new();
    page.control("TH", ["fieldpost.toml", "5", &format!("fieldpost {version}")]);
    page.control("SH", ["NAME"]).text([roman("fieldpost.toml - the configuration of fieldpost(1)")]);
    page.control("SH", ["DESCRIPTION"]);
    prose(&mut page, &about);
    page.control("SH", ["SETTINGS"]);
    for part in &parts {
        match part {
            Part::Table { header, text } => {
                page.control("SS", [header.as_str()]);
                prose(&mut page, text);
            }
            Part::Settings { settings, text } => {
                for (place, lines) in settings.iter().enumerate() {
                    page.control(if place == 0 { "TP" } else { "TQ" }, []).text(tag(lines));
                }
                prose(&mut page, text);
                for lines in settings.iter().filter(|lines| lines.len() > 1) {
                    page.control("EX", []);
                    lines.iter().for_each(|line| {
                        page.text([roman(line.as_str())]);
                    });
                    page.control("EE", []);
                }
            }
        }
    }
    page.control("SH", ["SEE ALSO"]).text([bold("fieldpost"), roman("(1)")]);
    page.render()
}

/// `**keep_alive** = "30s"`; of a value that goes on in the next line the beginning.
fn tag(lines: &[String]) -> Vec<Inline> {
    let first = lines.first().map_or("", String::as_str);
    let (key, value) = first.split_once('=').unwrap_or((first, ""));
    let goes_on = if lines.len() > 1 { " \u{2026}" } else { "" };
    vec![bold(key.trim_end()), roman(format!(" ={value}{goes_on}"))]
}

/// A paragraph for each run of lines; an empty one stands between two.
fn prose(page: &mut Roff, lines: &[String]) {
    for line in lines {
        match line.is_empty() {
            true => page.control("PP", []),
            false => page.text([roman(line.as_str())]),
        };
    }
}

/// What stands before the first table, and the parts.
fn parts(file: &str) -> (Vec<String>, Vec<Part>) {
    let (mut about, mut parts) = (Vec::new(), Vec::new());
    let mut text: Vec<String> = Vec::new();
    // Whether the line before was a setting, whose text the next one shares.
    let mut shares = false;
    let mut lines = file.lines();
    while let Some(line) = lines.next() {
        if line.is_empty() && parts.is_empty() {
            about.append(&mut text);
        }
        if line.is_empty() || line == "#" || line.starts_with("# ") {
            shares = false;
            if let Some(line) = line.strip_prefix('#') {
                text.push(line.trim_start().to_owned());
            }
            continue;
        }
        let line = line.strip_prefix('#').unwrap_or(line);
        if line.starts_with('[') {
            parts.push(Part::Table { header: line.to_owned(), text: std::mem::take(&mut text) });
            shares = false;
            continue;
        }
        let mut setting = vec![line.to_owned()];
        while open(&setting) {
            let Some(next) = lines.next() else { break };
            setting.push(next.to_owned());
        }
        match parts.last_mut() {
            Some(Part::Settings { settings, .. }) if shares => settings.push(setting),
            _ => parts.push(Part::Settings { settings: vec![setting], text: std::mem::take(&mut text) }),
        }
        shares = true;
    }
    about.append(&mut text);
    (about, parts)
}

/// Whether a value's brackets are not all closed yet.
fn open(lines: &[String]) -> bool {
    let count = |bracket| lines.iter().map(|line| line.matches(bracket).count()).sum::<usize>();
    count('[') > count(']')
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = include_str!("../../config/fieldpost.toml");

    #[test]
    fn every_setting_of_the_file_is_in_its_page() {
        let page = page(FILE, "1.2.3");
        let key = |line: &str| {
            let (key, _) = line.trim_start_matches('#').split_once(" = ")?;
            key.chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
                .then(|| key.to_owned())
        };
        let keys: Vec<String> = FILE.lines().filter_map(key).collect();
        assert!(keys.len() > 60, "{keys:?}");
        for key in keys {
            assert!(page.contains(&format!("\\fB{key}\\fR")), "{key} is missing in {page}");
        }
    }

    #[test]
    fn every_word_of_the_file_is_in_its_page() {
        let page = page(FILE, "1.2.3").replace('\\', "");
        for word in FILE.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| word.len() > 2) {
            assert!(page.contains(word), "{word} is missing");
        }
    }

    #[test]
    fn text_belongs_to_what_follows_it_and_neighbours_share_it() {
        let file =
            "# About.\n\n# A table.\n[one]\n# Both of them.\n#first = 1\n#second = 2\n\nthird = [\n  4,\n]\n";
        let setting = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let (about, parts) = parts(file);
        assert_eq!(about, ["About."]);
        assert_eq!(
            parts,
            [
                Part::Table { header: "[one]".into(), text: vec!["A table.".into()] },
                Part::Settings {
                    settings: vec![setting(&["first = 1"]), setting(&["second = 2"])],
                    text: vec!["Both of them.".into()]
                },
                Part::Settings { settings: vec![setting(&["third = [", "  4,", "]"])], text: vec![] },
            ]
        );
    }
}
