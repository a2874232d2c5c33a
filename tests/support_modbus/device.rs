//! Devices that misbehave on purpose, which no proper Modbus library does: a few lines each, over real TCP
//! and real pseudo terminals.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::pty::Pty;

/// A read request as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    pub unit: u8,
    pub function: u8,
    pub address: u16,
    pub count: u16,
}

impl Asked {
    fn parse(unit: u8, pdu: &[u8]) -> Self {
        let word = |at: usize| u16::from_be_bytes([pdu[at], pdu[at + 1]]);
        Asked { unit, function: pdu[0], address: word(1), count: word(3) }
    }

    /// A reply with these registers, whatever was asked for.
    pub fn registers(self, registers: &[u16]) -> Answer {
        let mut pdu = vec![self.function, registers.len() as u8 * 2];
        pdu.extend(registers.iter().flat_map(|register| register.to_be_bytes()));
        Answer::Pdu(pdu)
    }

    /// A reply in which every register holds its own address.
    pub fn addresses(self) -> Answer {
        let registers: Vec<u16> = (self.address..self.address + self.count).collect();
        self.registers(&registers)
    }

    /// The confirmation of a write to one coil or register, whose value stands where a read has its count.
    pub fn echo(self) -> Answer {
        Answer::Pdu([&[self.function][..], &self.address.to_be_bytes(), &self.count.to_be_bytes()].concat())
    }

    pub fn exception(self, code: u8) -> Answer {
        Answer::Pdu(vec![self.function | 0x80, code])
    }
}

/// What a device does with a request.
pub enum Answer {
    Pdu(Vec<u8>),
    Silence,
    /// Closes the connection.
    Cut,
    /// Answers and closes the connection.
    Last(Vec<u8>),
}

/// A Modbus TCP server with one behaviour.
pub struct TcpDevice {
    pub port: u16,
    pub connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl TcpDevice {
    pub async fn new(behaviour: impl Fn(Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(AtomicUsize::new(0));
        let (behaviour, count) = (Arc::new(behaviour), Arc::clone(&connections));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let behaviour = Arc::clone(&behaviour);
                tokio::spawn(async move { serve(stream, &*behaviour).await });
            }
        });
        TcpDevice { port, connections, task }
    }
}

impl Drop for TcpDevice {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until the connection ends.
async fn serve(mut stream: TcpStream, behaviour: &(impl Fn(Asked) -> Answer + Sync)) -> Option<()> {
    loop {
        let mut request = [0; 12];
        stream.read_exact(&mut request).await.ok()?;
        let (pdu, last) = match behaviour(Asked::parse(request[6], &request[7..])) {
            Answer::Pdu(pdu) => (pdu, false),
            Answer::Last(pdu) => (pdu, true),
            Answer::Silence => continue,
            Answer::Cut => return None,
        };
        let mut reply = request[..4].to_vec();
        reply.extend((pdu.len() as u16 + 1).to_be_bytes());
        reply.push(request[6]);
        reply.extend(pdu);
        stream.write_all(&reply).await.ok()?;
        if last {
            return None;
        }
    }
}

/// An RTU unit that takes `delay` to answer each request in turn with the registers' own addresses.
pub async fn slow_rtu_unit(pty: Pty, delay: impl Fn(Asked) -> Duration) {
    let mut heard = Vec::new();
    loop {
        while heard.len() < 8 {
            let mut bytes = [0; 64];
            let Ok(length) = pty.read(&mut bytes).await else { return };
            heard.extend_from_slice(&bytes[..length]);
        }
        let request: Vec<u8> = heard.drain(..8).collect();
        let asked = Asked::parse(request[0], &request[1..6]);
        assert_eq!(crc(&request[..6]), request[6..8], "a request with a wrong CRC: {request:02x?}");
        device_time(delay(asked)).await;
        let answer = if asked.function == 6 { asked.echo() } else { asked.addresses() };
        let Answer::Pdu(pdu) = answer else { continue };
        let mut reply = vec![request[0]];
        reply.extend(pdu);
        reply.extend(crc(&reply));
        if pty.write_all(&reply).await.is_err() {
            return;
        }
    }
}

/// The device is thinking; nothing in a test waits for this.
fn device_time(duration: Duration) -> impl Future<Output = ()> {
    tokio::time::sleep(duration)
}

/// The CRC in the order it is sent (Modbus over serial line V1.02, 6.2.2).
fn crc(bytes: &[u8]) -> [u8; 2] {
    let mut crc = 0xFFFFu16;
    for byte in bytes {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xA001 } else { crc >> 1 };
        }
    }
    crc.to_le_bytes()
}
