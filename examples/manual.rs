//! The manual pages and the shells' completions, written into a folder: what a package ships beside the program.
//!
//! ```text
//! cargo run --example manual -- target/manual
//! ```
//!
//! Everything is taken from what holds it anyway: the commands from their parser, the settings from
//! `config/fieldpost.toml`. An example and no command, so that the shipped program stays small.
//! Invariant: the same sources make the same bytes.

#[path = "manual/settings.rs"]
mod settings;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Command, Parser};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// The manual pages and the shells' completions of fieldpost.
#[derive(Debug, Parser)]
#[command(name = "manual")]
struct Arguments {
    /// Where `man/` and `completions/` are written
    folder: PathBuf,
}

const EXIT_STATUS: &[(&str, &str)] = &[
    (
        "0",
        "Done, or asked to stop by SIGTERM or SIGINT. A second signal skips waiting for acknowledgements, and loses nothing.",
    ),
    ("78", "The configuration is bad. Nothing was started, and starting again will not help."),
    ("1", "Anything else, with the reason on standard error."),
];

const ENVIRONMENT: &[(&str, &str)] = &[
    (
        "FIELDPOST_LOG",
        "What the log says, before [log] level in the configuration: a level (error, warn, info, debug, trace), or a level for each module, as in info,fieldpost::uplink=debug.",
    ),
    ("NO_COLOR", "Set to anything: no colours."),
];

const FILES: &[(&str, &str)] = &[
    ("/etc/fieldpost/fieldpost.toml", "The configuration of the packaged service; see fieldpost.toml(5)."),
    (
        "/var/lib/fieldpost/outbox.db",
        "The database, unless [store] path says otherwise; with outbox.db-wal while the agent runs. What waits for the broker is in here.",
    ),
    (
        "/var/lib/fieldpost/outbox.db.reserve",
        "4 MiB given up when the disk is full, so that the queue can still drain.",
    ),
    (
        "/var/lib/fieldpost/outbox.db.corrupt-*",
        "A damaged database that was set aside; the newest two are kept.",
    ),
    (
        "/var/lib/fieldpost/control.sock",
        "The socket of the other commands, unless [control] socket says otherwise; for the agent's user, its group and root.",
    ),
];

fn main() -> ExitCode {
    let folder = Arguments::parse().folder;
    match write_manual(&folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "manual: cannot write into {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

fn write_manual(folder: &Path) -> io::Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(fieldpost::cli::command(), &man)?;
    // Instead of the one that was written just now: this one says more.
    fs::write(man.join("fieldpost.1"), program_page(fieldpost::cli::command())?)?;
    let settings = settings::page(include_str!("../config/fieldpost.toml"), env!("CARGO_PKG_VERSION"));
    fs::write(man.join("fieldpost.toml.5"), settings)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut fieldpost::cli::command(), "fieldpost", &completions)?;
    }
    Ok(())
}

/// The page of the program itself: what its parser says, and what no parser knows.
fn program_page(command: Command) -> io::Result<Vec<u8>> {
    let man = Man::new(command.disable_help_subcommand(true));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_subcommands_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut rest = Roff::new();
    for (title, entries) in [("EXIT STATUS", EXIT_STATUS), ("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)] {
        rest.control("SH", [title]);
        for (name, text) in entries {
            rest.control("TP", []).text([bold(*name)]).text([roman(*text)]);
        }
    }
    rest.control("SH", ["SEE ALSO"]).text([
        bold("fieldpost.toml"),
        roman("(5), "),
        bold("systemctl"),
        roman("(1)"),
    ]);
    page.write_all(rest.to_roff().as_bytes())?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of every command and those below it, as their pages are called.
    fn pages(command: &Command, name: &str) -> Vec<String> {
        let below = command.get_subcommands().filter(|one| one.get_name() != "help");
        let below = below.flat_map(|one| pages(one, &format!("{name}-{}", one.get_name())));
        std::iter::once(format!("{name}.1")).chain(below).collect()
    }

    #[test]
    fn every_command_has_a_page_and_every_shell_its_completions() {
        let folder = tempfile::tempdir().expect("a folder");
        write_manual(folder.path()).expect("written");
        let pages = pages(&fieldpost::cli::command(), "fieldpost");
        assert!(pages.contains(&"fieldpost-queue-purge.1".to_owned()), "{pages:?}");
        for page in &pages {
            let text = fs::read_to_string(folder.path().join("man").join(page)).expect(page);
            assert!(text.contains(".SH SYNOPSIS"), "{page}: {text}");
        }
        for file in ["fieldpost.bash", "fieldpost.fish", "_fieldpost"] {
            let text = fs::read_to_string(folder.path().join("completions").join(file)).expect(file);
            assert!(text.contains("requeue"), "{file}");
        }
    }

    #[test]
    fn the_page_of_the_program_says_what_no_parser_knows() {
        let page = program_page(fieldpost::cli::command()).expect("written");
        let page = String::from_utf8(page).expect("text");
        for words in ["EXIT STATUS", "78", "FIELDPOST_LOG", "outbox.db"] {
            assert!(page.contains(words), "{words}: {page}");
        }
    }
}
