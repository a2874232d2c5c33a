//! Tests built for another machine, and run here by an emulator (`cross/test.sh`): what they start, and how long they
//! wait. Without its variables nothing is different.
#![allow(dead_code, unreachable_pub)]

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

/// A command for one of our own programs. Built for another machine, it is run by the emulator that
/// FIELDPOST_TEST_RUNNER names, with its arguments.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let runner = std::env::var("FIELDPOST_TEST_RUNNER").unwrap_or_default();
    let mut words = runner.split_whitespace();
    let Some(emulator) = words.next() else { return Command::new(program) };
    let mut command = Command::new(emulator);
    command.args(words).arg(program);
    command
}

/// The C compiler for what is preloaded into our programs: `cc`, unless FIELDPOST_TEST_CC names another.
pub fn c_compiler() -> Command {
    Command::new(std::env::var_os("FIELDPOST_TEST_CC").unwrap_or_else(|| "cc".into()))
}

/// What a time becomes where everything is slower by the whole number FIELDPOST_TEST_PATIENCE.
pub fn patient(within: Duration) -> Duration {
    let factor = std::env::var("FIELDPOST_TEST_PATIENCE").ok();
    within * factor.map_or(1, |factor| factor.parse().expect("FIELDPOST_TEST_PATIENCE is a whole number"))
}
