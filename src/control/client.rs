//! The other end of the control socket, for the commands: blocking, because they do nothing else.

use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::wire::{Answer, LINE_MAX_BYTES, Question};

/// Longer than the agent's own deadline, so that its reason is heard.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no agent answers on {}: {source}; is fieldpost running (systemctl status fieldpost), and are you in its group \
         (sudo usermod -aG fieldpost $USER, then log in again)? --socket or --config says where it listens",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The request is longer than the agent reads.
    #[error("the message is too large: at most {} KiB fit", LINE_MAX_BYTES / 1024)]
    TooLarge,
    /// The connection broke.
    #[error("the connection to the agent broke: {0}; whatever it has not accepted must be sent again")]
    Io(#[from] io::Error),
    /// Not an answer.
    #[error("the agent's answer is not understood: {0}; is it another version?")]
    Answer(#[from] serde_json::Error),
}

/// Connects to the agent.
///
/// # Errors
/// Nobody listens there.
pub fn connect(path: &Path) -> Result<(Asker, Answers), ClientError> {
    let failed = |source| ClientError::Connect { path: path.to_owned(), source };
    let stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_write_timeout(Some(ANSWER_DEADLINE))?;
    stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
    let read = BufReader::new(stream.try_clone()?);
    Ok((Asker { write: BufWriter::new(stream) }, Answers { read }))
}

/// Asks one thing and waits for its answer.
///
/// # Errors
/// Nobody listens there, or the connection broke.
pub fn ask(path: &Path, question: &Question) -> Result<Answer, ClientError> {
    let (mut asker, mut answers) = connect(path)?;
    asker.ask(question)?;
    asker.flush()?;
    answers.hear()
}

/// The half that asks.
#[derive(Debug)]
pub struct Asker {
    write: BufWriter<UnixStream>,
}

impl Asker {
    /// Writes a request; [`Asker::flush`] sends it.
    ///
    /// # Errors
    /// It is too large, or the connection broke.
    pub fn ask(&mut self, question: &Question) -> Result<(), ClientError> {
        let mut line = serde_json::to_vec(question)?;
        if line.len() > LINE_MAX_BYTES {
            return Err(ClientError::TooLarge);
        }
        line.push(b'\n');
        Ok(self.write.write_all(&line)?)
    }

    /// Sends what was written.
    ///
    /// # Errors
    /// The connection broke.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        Ok(self.write.flush()?)
    }
}

/// The half that hears.
#[derive(Debug)]
pub struct Answers {
    read: BufReader<UnixStream>,
}

impl Answers {
    /// The answer to the oldest request that has none yet.
    ///
    /// # Errors
    /// The connection broke, or nothing came for two minutes.
    pub fn hear(&mut self) -> Result<Answer, ClientError> {
        let mut line = String::new();
        match self.read.read_line(&mut line)? {
            0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }
}
