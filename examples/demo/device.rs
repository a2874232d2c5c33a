//! A simulated Modbus TCP device: two units behind one port, whose values move.
//!
//! Every unit counts its readings in its first two registers, so that each value can be told from every other
//! on its way. Invariant: a count is served once, and a reply whose count was served has left completely
//! before the device may be switched off.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The units' names, in the order of their unit identifiers 1 and 2.
pub(crate) const UNITS: [&str; 2] = ["boiler", "pump"];

/// Registers of each unit: count of readings (u32), a float, a number in hundredths.
const REGISTERS: usize = 5;

/// Longest PDU of a Modbus message (V1.1b3, section 4.1).
const PDU_MAX: usize = 253;

/// Function code 4, Read Input Registers (V1.1b3, section 6.4).
const READ_INPUT_REGISTERS: u8 = 4;

/// What the units measure at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    /// Of the boiler, in °C.
    pub(crate) temperature: f32,
    /// Of the boiler, in hundredths of a bar.
    pub(crate) pressure: u16,
    /// Of the pump, in m³/h.
    pub(crate) flow: f32,
    /// Of the pump, in hundredths of a kilowatt.
    pub(crate) power: u16,
}

/// The device. It ends with its handle.
#[derive(Debug)]
pub(crate) struct Device {
    port: u16,
    on: watch::Sender<bool>,
    process: Arc<Process>,
}

/// What is measured, and how often it has been read.
#[derive(Debug)]
struct Process {
    started: Instant,
    served: [AtomicU32; UNITS.len()],
}

impl Device {
    /// Listens on a free port of this machine.
    pub(crate) async fn start() -> io::Result<Device> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let process = Arc::new(Process { started: Instant::now(), served: Default::default() });
        let (on, is_on) = watch::channel(true);
        tokio::spawn(listen(listener, Arc::clone(&process), is_on));
        Ok(Device { port, on, process })
    }

    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// What it measures now.
    pub(crate) fn measured(&self) -> Measured {
        self.process.measured()
    }

    /// How many readings of each unit have been served; their counts run from 1 to this.
    pub(crate) fn served(&self) -> [u32; UNITS.len()] {
        [0, 1].map(|unit: usize| self.process.served[unit].load(Ordering::Relaxed))
    }

    /// Takes no more connections, and closes each at its next request: what it answered before was read, or
    /// there would be no next request.
    pub(crate) fn switch_off(&self) {
        self.on.send_replace(false);
    }
}

impl Process {
    fn measured(&self) -> Measured {
        let t = self.started.elapsed().as_secs_f32();
        Measured {
            temperature: 64.0 + 6.0 * (t / 3.1).sin() + 0.3 * (t * 2.3).sin(),
            pressure: (230.0 + 25.0 * (t / 4.7).sin()) as u16,
            flow: 12.0 + 2.5 * (t / 2.2).cos(),
            power: (540.0 + 60.0 * (t / 2.2).cos() + 5.0 * (t * 3.0).sin()) as u16,
        }
    }

    /// One reading of a unit, counted.
    fn registers(&self, unit: usize) -> [u16; REGISTERS] {
        let count = self.served[unit].fetch_add(1, Ordering::Relaxed) + 1;
        let now = self.measured();
        let (float, hundredths) = match unit {
            0 => (now.temperature, now.pressure),
            _ => (now.flow, now.power),
        };
        let (count, float) = (count.to_be_bytes(), float.to_be_bytes());
        let word = |bytes: [u8; 4], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        [word(count, 0), word(count, 2), word(float, 0), word(float, 2), hundredths]
    }

    /// The answer to a request PDU: registers or an exception (V1.1b3, section 7).
    fn answer(&self, unit: u8, pdu: &[u8]) -> Vec<u8> {
        let &[function, a, b, c, d] = pdu else {
            return vec![pdu[0] | 0x80, 3]; // illegal data value
        };
        let unit = usize::from(unit).wrapping_sub(1);
        if function != READ_INPUT_REGISTERS || unit >= UNITS.len() {
            return vec![function | 0x80, 1]; // illegal function
        }
        if u16::from_be_bytes([a, b]) != 0 || usize::from(u16::from_be_bytes([c, d])) != REGISTERS {
            // A reading is all of them, or its count would not name it.
            return vec![function | 0x80, 2]; // illegal data address
        }
        let mut reply = vec![function, REGISTERS as u8 * 2];
        reply.extend(self.registers(unit).iter().flat_map(|register| register.to_be_bytes()));
        reply
    }
}

async fn listen(listener: TcpListener, process: Arc<Process>, mut on: watch::Receiver<bool>) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = on.wait_for(|on| !on) => return,
        };
        let Ok((stream, _)) = accepted else { continue };
        let (process, on) = (Arc::clone(&process), on.clone());
        tokio::spawn(async move { serve(stream, &process, &on).await });
    }
}

/// Answers until the client hangs up or talks nonsense, or the device is off.
async fn serve(mut stream: TcpStream, process: &Process, on: &watch::Receiver<bool>) -> io::Result<()> {
    // A reply is one small packet that somebody waits for.
    stream.set_nodelay(true)?;
    loop {
        // MBAP header: transaction, protocol 0, length of what follows, unit identifier.
        let mut header = [0; 7];
        stream.read_exact(&mut header).await?;
        let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
        if header[2..4] != [0, 0] || !(2..=PDU_MAX + 1).contains(&length) {
            return Ok(());
        }
        let mut pdu = vec![0; length - 1];
        stream.read_exact(&mut pdu).await?;
        if !*on.borrow() {
            return Ok(());
        }
        let answer = process.answer(header[6], &pdu);
        let mut reply = header[..4].to_vec();
        reply.extend_from_slice(&(answer.len() as u16 + 1).to_be_bytes());
        reply.push(header[6]);
        reply.extend_from_slice(&answer);
        stream.write_all(&reply).await?;
    }
}
