//! Pseudo terminals as serial ports, alone or two joined by a cable.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

/// A serial port at `path`, and its other end.
pub struct Pty {
    pub path: PathBuf,
    master: AsyncFd<OwnedFd>,
    /// Keeps the port's settings, and its other end from failing while nobody has the port open.
    _slave: OwnedFd,
}

impl Pty {
    pub fn new() -> Self {
        let (path, master, slave) = open().expect("the system gives a pseudo terminal");
        rustix::io::ioctl_fionbio(&master, true).expect("a terminal need not block");
        #[expect(
            deprecated,
            reason = "its successor is unsafe, for types that change their descriptor; this is none"
        )]
        let master = AsyncFd::new(master).expect("a runtime is there, and takes the descriptor");
        Pty { path, master, _slave: slave }
    }

    pub async fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            if let Ok(done) = ready.try_io(|master| rustix::io::read(master, &mut *buf).map_err(Into::into)) {
                return done;
            }
        }
    }

    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.master.writable().await?;
            if let Ok(done) = ready.try_io(|master| rustix::io::write(master, bytes).map_err(Into::into)) {
                bytes = &bytes[done?..];
            }
        }
        Ok(())
    }
}

/// A port's path, its other end, and the port itself, open and raw: unlike a serial port it would echo.
pub fn open() -> io::Result<(PathBuf, OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = ptsname(&master, Vec::new())?.into_string().map_err(io::Error::other)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(&path, flags, Mode::empty())?;
    let mut settings = tcgetattr(&slave)?;
    settings.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &settings)?;
    Ok((path.into(), master, slave))
}

/// Two serial ports joined by a null modem cable; dropping it makes both vanish.
pub struct Cable {
    pub here: PathBuf,
    pub there: PathBuf,
    pumps: [JoinHandle<()>; 2],
}

impl Cable {
    pub fn new() -> Self {
        let (here, there) = (Arc::new(Pty::new()), Arc::new(Pty::new()));
        Cable {
            here: here.path.clone(),
            there: there.path.clone(),
            pumps: [
                tokio::spawn(pump(Arc::clone(&here), Arc::clone(&there))),
                tokio::spawn(pump(there, here)),
            ],
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.pumps.iter().for_each(JoinHandle::abort);
    }
}

async fn pump(from: Arc<Pty>, to: Arc<Pty>) {
    let mut bytes = [0; 512];
    while let Ok(length) = from.read(&mut bytes).await {
        if to.write_all(&bytes[..length]).await.is_err() {
            break;
        }
    }
}
