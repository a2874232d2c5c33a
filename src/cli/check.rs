//! `fieldpost check FILE`.

use std::path::Path;
use std::process::ExitCode;

use crate::config;

/// Checks a configuration file.
pub fn check(path: &Path) -> ExitCode {
    match config::load(path) {
        Ok(_) => ExitCode::SUCCESS,
        Err(problems) => {
            eprintln!("{problems}");
            ExitCode::from(78)
        }
    }
}
