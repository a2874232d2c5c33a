//! Taking values out of tables: every getter returns a value or notes a problem and lets the walk go on.
//!
//! Invariant: whatever a getter returns after a problem never leaves this module tree, because a walk with
//! problems ends in [`Problems`] and not in a configuration.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::place::{Place, Problem, Problems, Source, shown};
use super::quantity;
use super::raw::{Keys, Node, Refused, TABLES, Table, Value};
use super::value::{self, Complaint, Surroundings};

/// A value with its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed<T> {
    pub(super) value: T,
    pub(super) place: Place,
}

/// A table and the keys it may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Section<'t> {
    pub(super) table: &'t Table,
    pub(super) keys: &'static Keys,
}

/// Stands for a table that is not in the file: everything in it has its default.
static ABSENT: Table = Table { place: Place { file: 0, start: 0, end: 0 }, entries: Vec::new() };

/// A problem before its place is turned into line and column.
struct Finding {
    place: Place,
    message: String,
    help: Option<String>,
}

/// The walk through the tables: where values come from, and what was wrong so far.
pub(super) struct Walk<'a> {
    pub(super) sources: &'a [Source],
    pub(super) around: &'a Surroundings<'a>,
    refused: Vec<Refused>,
    findings: Vec<Finding>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(sources: &'a [Source], around: &'a Surroundings<'a>, refused: Vec<Refused>) -> Self {
        Walk { sources, around, refused, findings: Vec::new() }
    }

    /// Notes a problem.
    pub(super) fn wrong(&mut self, place: Place, complaint: Complaint) {
        self.findings.push(Finding { place, message: complaint.message, help: complaint.help });
    }

    /// Notes that two places do not go together, at the later one.
    pub(super) fn clash(&mut self, place: Place, message: String, first: Place, help: &str) {
        let message = format!("{message}; first at {}", self.name_of(first));
        self.wrong(place, Complaint::new(message).help(help));
    }

    /// `file:line:column` of a place.
    pub(super) fn name_of(&self, place: Place) -> String {
        self.sources[place.file].name_of(place)
    }

    /// Refuses every key that the table does not have.
    pub(super) fn only_known(&mut self, table: &Table, keys: &Keys) {
        for entry in table.entries.iter().filter(|entry| keys.get(&entry.key).is_none()) {
            if self
                .refused
                .iter()
                .any(|r| r.structural && r.place.file == table.place.file && r.place < entry.key_place)
            {
                // After a broken header or bracket the keys may belong to a table that was not recognised.
                continue;
            }
            let complaint = Complaint::new(format!("unknown key `{}` in {}", entry.key, keys.header));
            let complaint = match keys.nearest(&entry.key) {
                Some(near) if near.name == "password_file" => complaint
                    .help("put the password into a file of its own and name that file: `password_file`"),
                Some(near) if near.name == "token_file" => {
                    complaint.help("put the token into a file of its own and name that file: `token_file`")
                }
                Some(near) => complaint.help(format!("did you mean `{}`?", near.name)),
                None => match home_of(&entry.key) {
                    Some(home) => complaint.help(format!("`{}` belongs in {home}", entry.key)),
                    None => complaint,
                },
            };
            self.wrong(entry.key_place, complaint);
        }
    }

    /// A table at the top of the file. Where it is missing, and `needed`, that is a problem.
    pub(super) fn section<'t>(
        &mut self,
        root: Section<'t>,
        name: &str,
        keys: &'static Keys,
        needed: bool,
    ) -> Section<'t> {
        if needed {
            self.must_have(root, name);
        }
        let table = root.table.get(name).and_then(|entry| self.table(&entry.node, keys));
        table.unwrap_or(Section { table: &ABSENT, keys })
    }

    /// A value that may be left out.
    pub(super) fn get<T>(
        &mut self,
        section: Section<'_>,
        key: &str,
        convert: impl FnOnce(&Value) -> Result<T, Complaint>,
    ) -> Option<Placed<T>> {
        debug_assert!(section.keys.get(key).is_some(), "{key} is not in the table of keys");
        let node = &section.table.get(key)?.node;
        match convert(&node.value) {
            Ok(value) => Some(Placed { value, place: node.place }),
            Err(complaint) => {
                let message = format!("`{key}`: {}", complaint.message);
                self.wrong(node.place, Complaint { message, ..complaint });
                None
            }
        }
    }

    /// A value that must be there.
    pub(super) fn need<T>(
        &mut self,
        section: Section<'_>,
        key: &str,
        convert: impl FnOnce(&Value) -> Result<T, Complaint>,
    ) -> Option<Placed<T>> {
        self.must_have(section, key);
        self.get(section, key, convert)
    }

    /// Notes a key that is not there, at the table's header.
    pub(super) fn must_have(&mut self, section: Section<'_>, key: &str) {
        let Section { table, keys } = section;
        let lost = |refused: &Refused| refused.structural && refused.place.file == table.place.file;
        if std::ptr::eq(table, &ABSENT) || table.get(key).is_some() || self.refused.iter().any(lost) {
            return;
        }
        // A misspelt key is told as one, and only once.
        let unknown = table.entries.iter().filter(|entry| keys.get(&entry.key).is_none());
        if unknown.filter_map(|entry| keys.nearest(&entry.key)).any(|near| near.name == key) {
            return;
        }
        let complaint = Complaint::new(format!("`{key}` is missing in {}", keys.header));
        let example = keys.get(key).map_or("", |key| key.example);
        self.wrong(table.place, complaint.help(format!("add, for example: {example}")));
    }

    /// A duration within a range.
    pub(super) fn duration(
        &mut self,
        section: Section<'_>,
        key: &str,
        range: RangeInclusive<Duration>,
        default: Duration,
    ) -> Duration {
        self.get(section, key, |value| quantity::duration(value, range)).map_or(default, |found| found.value)
    }

    /// The path that a value names, starting from the directory of the file that names it.
    pub(super) fn path(&mut self, section: Section<'_>, key: &str) -> Option<Placed<PathBuf>> {
        let written = self.get(section, key, |value| match value::text(value)? {
            "" => Err(Complaint::new("the path is empty")),
            text if text.contains('\0') => Err(Complaint::new("a path holds no NUL character")),
            text => Ok(PathBuf::from(text)),
        })?;
        let directory = self.sources[written.place.file].path.parent().unwrap_or(Path::new(""));
        Some(Placed { value: directory.join(written.value), place: written.place })
    }

    /// Like [`Walk::path`], but a systemd credential of that name comes first (systemd.exec, Credentials).
    pub(super) fn secret_path(&mut self, section: Section<'_>, key: &str) -> Option<PathBuf> {
        let beside = self.path(section, key)?.value;
        let credentials =
            (self.around.variable)("CREDENTIALS_DIRECTORY").filter(|directory| !directory.is_empty());
        let Some(Value::Text(name)) = section.table.get(key).map(|entry| &entry.node.value) else {
            return Some(beside);
        };
        let credential = credentials.map(|directory| Path::new(&directory).join(name));
        let path = credential.filter(|path| path.is_file()).unwrap_or(beside);
        self.keep_secret(section, key, &path);
        Some(path)
    }

    /// What everybody may read is no secret. A file that is not there yet is for the connection to miss.
    fn keep_secret(&mut self, section: Section<'_>, key: &str, path: &Path) {
        let Some(entry) = section.table.get(key) else { return };
        let mode = std::fs::metadata(path).map_or(0, |file| file.mode() & 0o777);
        if mode & 0o007 != 0 {
            let path = path.display();
            let complaint =
                Complaint::new(format!("{path} can be read by every user of this machine (mode {mode:03o})"));
            let help = format!("run `chmod 640 {path}`, and give the file to the user fieldpost runs as");
            self.wrong(entry.node.place, complaint.help(help));
        }
    }

    /// The tables of an array of tables, their keys checked.
    pub(super) fn tables<'t>(
        &mut self,
        section: Section<'t>,
        key: &str,
        keys: &'static Keys,
    ) -> Vec<Section<'t>> {
        let Some(entry) = section.table.get(key) else { return Vec::new() };
        let Value::Array(nodes) = &entry.node.value else {
            let found = &entry.node.value;
            let complaint = Complaint::new(format!("`{key}`: expected an array of tables, found {found}"));
            self.wrong(entry.node.place, complaint.help(format!("begin each one with {}", keys.header)));
            return Vec::new();
        };
        nodes.iter().filter_map(|node| self.table(node, keys)).collect()
    }

    /// The value as a table, its keys checked.
    pub(super) fn table<'t>(&mut self, node: &'t Node, keys: &'static Keys) -> Option<Section<'t>> {
        match &node.value {
            Value::Table(table) => {
                self.only_known(table, keys);
                Some(Section { table, keys })
            }
            other => {
                let complaint = Complaint::new(format!("expected a table {}, found {other}", keys.header));
                self.wrong(node.place, complaint);
                None
            }
        }
    }

    /// Every problem in the order of places, or nothing.
    pub(super) fn finish(self) -> Result<(), Problems> {
        let Walk { sources, mut refused, findings, .. } = self;
        refused.sort_by_key(|refused| refused.place);
        let line_of = |place: Place| (place.file, sources[place.file].line_of(place.start));
        let broken = refused.iter().map(|refused| line_of(refused.place)).collect::<HashSet<_>>();
        // What could not be read on a line is the problem there; what was made of the rest is not.
        let mut all =
            findings.into_iter().filter(|found| !broken.contains(&line_of(found.place))).collect::<Vec<_>>();
        // A parser out of step stumbles over every word of a line; the first one tells.
        let mut told = HashSet::new();
        let first = |refused: &Refused| !refused.structural || told.insert(line_of(refused.place));
        let refused = refused.into_iter().filter(first);
        all.extend(refused.map(|r| Finding { place: r.place, message: r.message, help: r.help }));
        all.sort_by(|a, b| (a.place, &a.message).cmp(&(b.place, &b.message)));
        all.dedup_by(|a, b| a.place == b.place && a.message == b.message);
        if all.is_empty() {
            return Ok(());
        }
        let show = |found: Finding| {
            let source = &sources[found.place.file];
            Problem {
                file: source.path.clone(),
                spot: Some(source.spot(found.place)),
                message: shown(&found.message),
                help: found.help.as_deref().map(shown),
            }
        };
        Err(Problems(all.into_iter().map(show).collect()))
    }
}

/// The table that has this key, for a key in the wrong one.
fn home_of(key: &str) -> Option<&'static str> {
    TABLES.iter().find(|table| table.get(key).is_some()).map(|table| table.header)
}
