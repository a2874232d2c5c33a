//! What every row is given: how much to measure, the program to measure, and a folder on a real disk.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Why a row could not be measured. A peer that is not installed is none: the row is shown without it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// Something did not happen, or was not as it must be.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    /// For `map_err`: what was being done when the system refused it.
    pub(crate) fn at(what: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
        let what = what.into();
        move |source| Failure::Io { what, source }
    }
}

/// How the rows are measured.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Smaller backlogs and fewer repeats: to see that everything works, not to be quoted.
    pub(crate) quick: bool,
    repeats: u16,
    /// The `fieldpost` program as it is shipped.
    pub(crate) program: PathBuf,
    folder: TempDir,
}

impl Setting {
    /// Builds the program, and makes a folder beside it: `/tmp` may be a tmpfs, whose writes cost no disk.
    pub(crate) fn new(quick: bool, repeats: Option<u16>) -> Result<Setting, Failure> {
        let this = std::env::current_exe().map_err(Failure::at("the path of this program"))?;
        let below = this.parent().and_then(Path::parent);
        let below = below.ok_or_else(|| Failure::Other(format!("{} is in no folder", this.display())))?;
        let program = below.join("fieldpost");
        build(below)?;
        if !program.is_file() {
            return Err(Failure::Other(format!("{} is missing: cargo build --release", program.display())));
        }
        let folder = folder_in(below)?;
        let repeats = repeats.unwrap_or(if quick { 1 } else { 5 });
        Ok(Setting { quick, repeats, program, folder })
    }

    /// Paired repeats of a row: 5, unless only a glance is wanted.
    pub(crate) fn repeats(&self) -> usize {
        usize::from(self.repeats)
    }

    /// A new folder for one agent or peer, on a real file system; gone after its row.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf, Failure> {
        let folder = tempfile::Builder::new().prefix(name).tempdir_in(self.folder.path());
        Ok(folder.map_err(Failure::at(format!("a folder for {name}")))?.keep())
    }

    /// Begins with an empty folder again: a million messages are some hundred megabytes.
    pub(crate) fn clear(&mut self) -> Result<(), Failure> {
        let below = self.program.parent().unwrap_or(Path::new("."));
        self.folder = folder_in(below)?;
        Ok(())
    }
}

fn folder_in(below: &Path) -> Result<TempDir, Failure> {
    let folder = tempfile::Builder::new().prefix("bench-").tempdir_in(below);
    folder.map_err(Failure::at(format!("a folder in {}", below.display())))
}

/// `cargo run --example` builds no binaries. Outside cargo the one that is there is taken.
fn build(profile: &Path) -> Result<(), Failure> {
    let Some(cargo) = std::env::var_os("CARGO") else { return Ok(()) };
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--bin", "fieldpost"]);
    command.arg("--manifest-path").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"));
    if profile.ends_with("release") {
        command.arg("--release");
    }
    let status = command.status().map_err(Failure::at("cargo build"))?;
    if status.success() { Ok(()) } else { Err(Failure::Other(format!("cargo build: {status}"))) }
}
