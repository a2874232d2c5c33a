//! What is commanded: a Modbus TCP server with holding registers that writes down everything it carries out.
//!
//! It lives in the test's process and outlives every agent. Invariant: a write stands in its log exactly as often
//! as a register was set.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Registers of the plant.
const REGISTERS: usize = 100;

/// A write that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Unit identifier.
    pub unit: u8,
    /// Which register.
    pub address: u16,
    /// What it was set to.
    pub value: u16,
}

#[derive(Debug)]
struct State {
    registers: Vec<u16>,
    log: Vec<Written>,
}

/// The running server.
#[derive(Debug)]
pub struct Plant {
    port: u16,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

impl Plant {
    /// Starts it on a free port of 127.0.0.1.
    pub async fn start() -> Plant {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State { registers: vec![0; REGISTERS], log: Vec::new() }));
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                tokio::spawn(async move { serve(stream, &state).await });
            }
        });
        Plant { port, state, task }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many writes it has carried out.
    pub fn writes(&self) -> usize {
        self.state.lock().unwrap().log.len()
    }

    /// How often each value was written, whatever the register.
    pub fn times(&self) -> BTreeMap<u16, usize> {
        let mut times = BTreeMap::new();
        for written in &self.state.lock().unwrap().log {
            *times.entry(written.value).or_insert(0) += 1;
        }
        times
    }

    /// Everything it has carried out, in order.
    pub fn log(&self) -> Vec<Written> {
        self.state.lock().unwrap().log.clone()
    }
}

impl Drop for Plant {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until the connection ends.
async fn serve(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let _immediate = stream.set_nodelay(true);
    loop {
        // MBAP header: transaction, protocol, length, unit (Modbus Messaging on TCP/IP 1.0b, 3.1.3).
        let mut header = [0; 7];
        stream.read_exact(&mut header).await.ok()?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut pdu = vec![0; length.checked_sub(1)?];
        stream.read_exact(&mut pdu).await.ok()?;
        let reply = answer(header[6], &pdu, &mut state.lock().unwrap());
        let mut packet = header[..4].to_vec();
        packet.extend((reply.len() as u16 + 1).to_be_bytes());
        packet.push(header[6]);
        packet.extend(reply);
        stream.write_all(&packet).await.ok()?;
    }
}

fn answer(unit: u8, pdu: &[u8], state: &mut State) -> Vec<u8> {
    let word = |at: usize| pdu.get(at..at + 2).map_or(0, |word| u16::from_be_bytes([word[0], word[1]]));
    let (address, second) = (word(1), word(2 + 1));
    let from = usize::from(address);
    match pdu[0] {
        3 if from + usize::from(second) <= REGISTERS => {
            let values = &state.registers[from..from + usize::from(second)];
            let mut reply = vec![3, second as u8 * 2];
            reply.extend(values.iter().flat_map(|value| value.to_be_bytes()));
            reply
        }
        6 if from < REGISTERS => {
            set(state, unit, address, second);
            pdu.to_vec()
        }
        16 if from + usize::from(second) <= REGISTERS => {
            for n in 0..second {
                set(state, unit, address + n, word(6 + 2 * usize::from(n)));
            }
            pdu[..5].to_vec()
        }
        3 | 6 | 16 => vec![pdu[0] | 0x80, 2],
        function => vec![function | 0x80, 1],
    }
}

fn set(state: &mut State, unit: u8, address: u16, value: u16) {
    state.registers[usize::from(address)] = value;
    state.log.push(Written { unit, address, value });
}
