//! The terminal of the live screen: taken over, drawn on, given back.
//!
//! Invariant: however the program ends, except by SIGKILL, the terminal is as it was before: the shell's screen, its
//! cursor, its echo. Nothing but whole rows is written, so nothing wraps and nothing flickers.

use std::io::{self, IsTerminal, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::super::columns::{Paint, Row};
use super::screen::Size;

/// The alternate screen, no cursor, no wrapping at its edge, empty.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// What stands between the two is shown at once; terminals that do not know it draw as they read.
const BEGIN: &str = "\x1b[?2026h";
const END: &str = "\x1b[?2026l";
/// After so many frames all rows are drawn again: the kernel may have written on a console meanwhile.
const ANEW_EVERY: u32 = 30;
/// A serial console does not know its size.
const UNKNOWN: Size = Size { columns: 80, rows: 24 };

/// Whether standard output can be drawn on.
pub(super) fn is_there() -> bool {
    let term = std::env::var("TERM").unwrap_or_default();
    io::stdout().is_terminal() && !term.is_empty() && term != "dumb"
}

/// The terminal, as long as it is ours.
#[derive(Debug)]
pub(super) struct Terminal {
    before: Option<Termios>,
    canvas: Canvas,
    paint: Paint,
}

impl Terminal {
    /// Takes it over. Keys are neither shown nor gathered to lines; Ctrl-C is a signal as before.
    pub(super) fn enter(paint: Paint) -> io::Result<Terminal> {
        let before = tcgetattr(io::stdin()).ok();
        let for_panics = before.clone();
        let hook = std::panic::take_hook();
        // The program is built to abort on a panic: nothing is dropped then.
        std::panic::set_hook(Box::new(move |panic| {
            give_back(for_panics.as_ref());
            hook(panic);
        }));
        let terminal = Terminal { before, canvas: Canvas::default(), paint };
        terminal.take()?;
        Ok(terminal)
    }

    fn take(&self) -> io::Result<()> {
        if let Some(before) = &self.before {
            let mut silent = before.clone();
            silent.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON);
            tcsetattr(io::stdin(), OptionalActions::Now, &silent)?;
        }
        write(ENTER)
    }

    /// Gives it back until the process is continued.
    pub(super) fn suspend(&mut self) -> io::Result<()> {
        give_back(self.before.as_ref());
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)?;
        self.canvas = Canvas::default();
        self.take()
    }

    /// Its size now.
    pub(super) fn size(&self) -> Size {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                Size { columns: size.ws_col.into(), rows: size.ws_row.into() }
            }
            _ => UNKNOWN,
        }
    }

    /// Draws these rows in a window of that size.
    pub(super) fn draw(&mut self, rows: &[Row], size: Size) -> io::Result<()> {
        write(&self.canvas.draw(rows, size, self.paint))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        give_back(self.before.as_ref());
    }
}

fn give_back(before: Option<&Termios>) {
    // There is nothing to be done about a terminal that is gone.
    let _gone = write(LEAVE);
    if let Some(before) = before {
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, before);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// What stands on the screen, so that only what changed is written.
#[derive(Debug, Default)]
struct Canvas {
    shown: Vec<String>,
    size: Option<Size>,
    frames: u32,
}

impl Canvas {
    /// What to write to make the screen show these rows.
    fn draw(&mut self, rows: &[Row], size: Size, paint: Paint) -> String {
        let resized = self.size != Some(size);
        let anew = resized || self.frames.is_multiple_of(ANEW_EVERY);
        self.frames = self.frames.wrapping_add(1);
        self.size = Some(size);
        let empty = Row::default();
        let wanted: Vec<String> =
            (0..size.rows).map(|at| rows.get(at).unwrap_or(&empty).painted(size.columns, paint)).collect();
        let mut text = BEGIN.to_owned();
        if resized {
            text.push_str("\x1b[2J");
        }
        for (at, row) in
            wanted.iter().enumerate().filter(|(at, row)| anew || self.shown.get(*at) != Some(row))
        {
            text.push_str(&format!("\x1b[{};1H{row}", at + 1));
        }
        text.push_str(END);
        self.shown = wanted;
        text
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    use super::*;

    const PLAIN: Paint = Paint { colours: false };

    #[test]
    fn only_what_changed_is_written_and_after_a_resize_everything() {
        let size = Size { columns: 5, rows: 3 };
        let mut canvas = Canvas::default();
        let first = canvas.draw(&[Row::of("one"), Row::of("two")], size, PLAIN);
        assert_eq!(
            first,
            format!("{BEGIN}\x1b[2J\x1b[1;1Hone  \x1b[2;1Htwo  \x1b[3;1H     {END}"),
            "rows that are not there are blank"
        );
        let same = canvas.draw(&[Row::of("one"), Row::of("two")], size, PLAIN);
        assert_eq!(same, format!("{BEGIN}{END}"));
        let changed = canvas.draw(&[Row::of("one"), Row::of("2")], size, PLAIN);
        assert_eq!(changed, format!("{BEGIN}\x1b[2;1H2    {END}"));
        let smaller = canvas.draw(&[Row::of("one"), Row::of("2")], Size { columns: 2, rows: 1 }, PLAIN);
        assert_eq!(smaller, format!("{BEGIN}\x1b[2J\x1b[1;1Ho…{END}"));
    }

    #[test]
    fn a_screen_that_somebody_wrote_on_is_drawn_anew_now_and_then() {
        let size = Size { columns: 3, rows: 1 };
        let mut canvas = Canvas::default();
        let drawn = (0..=ANEW_EVERY).map(|_| canvas.draw(&[Row::of("abc")], size, PLAIN));
        let drawn: Vec<bool> = drawn.map(|text| text.contains("abc")).collect();
        assert_eq!(drawn.iter().filter(|drawn| **drawn).count(), 2);
        assert!(drawn[0] && drawn[ANEW_EVERY as usize]);
    }

    /// The child of the test below.
    #[test]
    #[ignore = "it is run by another test, on a terminal"]
    fn the_one_that_panics() {
        let _terminal = Terminal::enter(PLAIN).expect("there is a terminal");
        panic!("a bug");
    }

    fn pty() -> io::Result<(OwnedFd, OwnedFd)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = ptsname(&master, Vec::new())?.into_string().map_err(io::Error::other)?;
        Ok((master, rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?))
    }

    #[test]
    fn a_panic_gives_the_terminal_back() {
        let (master, slave) = pty().expect("the system gives a pseudo terminal");
        rustix::io::ioctl_fionbio(&master, true).expect("a terminal need not block");
        let before = tcgetattr(&slave).expect("a terminal");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args([
            "--exact",
            "--ignored",
            "--nocapture",
            "cli::watch::terminal::tests::the_one_that_panics",
        ]);
        let mut child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("it can be run");
        let mut written = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        let ended = loop {
            let mut some = [0; 4096];
            if let Ok(length) = rustix::io::read(&master, &mut some) {
                written.extend_from_slice(&some[..length]);
                continue;
            }
            if let Some(status) = child.try_wait().expect("our child") {
                break status;
            }
            assert!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&written));
            std::thread::sleep(Duration::from_millis(5));
        };
        let written = String::from_utf8_lossy(&written);
        let (entered, left) = (written.find(ENTER), written.find(LEAVE));
        assert!(!ended.success() && entered.is_some() && left > entered, "{written}");
        assert!(written.find("a bug") > left, "what the panic says stands on the shell's screen: {written}");
        let after = tcgetattr(&slave).expect("a terminal");
        assert_eq!(after.local_modes, before.local_modes);
    }
}
