//! How large the program is.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::setting::{Failure, Setting};
use crate::table::{Better, Peer, Row};

/// The program as cargo's release profile leaves it, and without its symbols.
pub(crate) fn rows(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let stripped = setting.folder("size")?.join("fieldpost");
    let mut strip = Command::new("strip");
    let done = strip.arg("-o").arg(&stripped).arg(&setting.program).status();
    let mut rows = vec![row("binary", "binary, as built", &setting.program, "the release profile")?];
    if done.is_ok_and(|status| status.success()) {
        rows.push(row("binary-stripped", "binary, stripped", &stripped, "strip")?);
    }
    Ok(rows)
}

fn row(name: &'static str, what: &str, file: &Path, how: &str) -> Result<Row, Failure> {
    let bytes = fs::metadata(file).map_err(Failure::at(file.display().to_string()))?.len();
    Ok(Row {
        name,
        what: what.to_owned(),
        unit: "MB",
        better: Better::Lower,
        ours: vec![bytes as f64 / 1e6],
        peer: Peer::None,
        aim: "<= 5",
        conditions: format!("{how}, {}, everything but the C library in one file", std::env::consts::ARCH),
    })
}
