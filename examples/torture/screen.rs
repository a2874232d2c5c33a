//! What the person in front of it sees: on a terminal a bar, elsewhere a line now and then.
//!
//! Invariant: it only shows.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Redraws a second, at most.
const REDRAWS: u8 = 10;
/// Without a terminal, a line is written this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The screen.
#[derive(Debug)]
pub(crate) struct Screen {
    bar: Option<ProgressBar>,
    cycles: u64,
    began: Instant,
    last_line: Instant,
}

impl Screen {
    /// Standard output, as it is.
    pub(crate) fn new(cycles: u64) -> Screen {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let bar = (io::stdout().is_terminal() && !dumb).then(|| {
            let target = ProgressDrawTarget::stdout_with_hz(REDRAWS);
            let style = ProgressStyle::with_template(
                "  {bar:28.green/black.bright} {pos}/{len}  {eta} left  {wide_msg}",
            );
            let style = style.expect("the template is ours").progress_chars("█▓░");
            ProgressBar::with_draw_target(Some(cycles), target).with_style(style)
        });
        Screen { bar, cycles, began: Instant::now(), last_line: Instant::now() }
    }

    /// Shows a moment: cycles done, and what is happening.
    pub(crate) fn show(&mut self, done: u64, words: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(words());
        } else if self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let seconds = self.began.elapsed().as_secs();
            self.say(&format!("  {seconds:5} s  {done}/{}  {}", self.cycles, words()));
        }
    }

    /// Writes lines that stay.
    pub(crate) fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            // Standard output may be closed; then there is nobody to tell.
            None => drop(writeln!(io::stdout(), "{text}")),
        }
    }

    /// Removes the bar; what was said stays.
    pub(crate) fn close(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
