//! Which fault comes next and when: drawn from the seed, and from nothing else. Pure.
//!
//! Invariant: the same seed and settings draw the same cycles. What a fault meets still depends on the machine.

use std::fmt;
use std::time::Duration;

use crate::disk::Keep;

/// How an agent ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// SIGKILL; what was written is there, synced or not.
    Kill,
    /// SIGKILL, and the disk holds what was synced.
    PowerCut(Keep),
    /// SIGTERM, and after its end the power goes.
    StopThenPowerCut(Keep),
}

/// What happens in a cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent ends, and starts again.
    End(End),
    /// Open connections break.
    LinkCut,
    /// The next connections break after so many bytes, towards the broker or from it.
    LinkCutAfter { bytes: u64, to_broker: bool },
    /// Nothing passes for a time, and nobody is told.
    HalfOpen { to_broker: bool, to_client: bool, lasts: Duration, end: Option<End> },
    /// The broker stops, keeping its sessions, and starts again.
    BrokerRestart { away: Duration, end: Option<End> },
    /// So many bytes still fit on the disk; then there is room again.
    DiskFull { room: u32, lasts: Duration, end: Option<End> },
}

/// One cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cycle {
    /// Bytes towards the broker before the fault, if they pass in time.
    pub(crate) bytes: u64,
    /// The longest wait for them.
    pub(crate) at_most: Duration,
    pub(crate) fault: Fault,
    /// What a COMMIT of the next agent takes longer, if the fault ends this one.
    pub(crate) stall: Duration,
    /// How long the disk takes to sync a file.
    pub(crate) sync: Duration,
}

/// What the cycles are to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Aim {
    /// That nothing breaks the agent.
    Everything,
    /// That a PUBREL before its commit is found out: the agent ends, with slow commits.
    BrokenOrder,
    /// That commits without sync are found out.
    NoSync,
}

/// Draws cycles.
#[derive(Debug)]
pub(crate) struct Plan {
    random: fastrand::Rng,
    aim: Aim,
}

impl Plan {
    /// Draws from this seed.
    pub(crate) fn new(seed: u64, aim: Aim) -> Plan {
        Plan { random: fastrand::Rng::with_seed(seed), aim }
    }

    /// The next cycle.
    pub(crate) fn draw(&mut self) -> Cycle {
        let fault = self.fault();
        let bytes = self.random.u64(0..40_000);
        let at_most = self.ms(20..600);
        let stall = match self.aim {
            Aim::BrokenOrder => Duration::from_millis(20),
            _ if self.random.u8(0..3) > 0 => Duration::ZERO,
            _ => self.ms(1..25),
        };
        let sync = match self.random.u8(0..4) {
            0 => Duration::ZERO,
            1 => self.ms(5..25),
            _ => Duration::from_micros(self.random.u64(200..5_000)),
        };
        Cycle { bytes, at_most, fault, stall, sync }
    }

    fn ms(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.random.u64(range))
    }

    fn fault(&mut self) -> Fault {
        let kind = match self.aim {
            Aim::Everything => self.random.u8(0..16),
            Aim::BrokenOrder => self.random.u8(0..8),
            Aim::NoSync => self.random.u8(4..8),
        };
        match kind {
            0..8 => Fault::End(self.end()),
            8..10 => Fault::LinkCut,
            10 => Fault::LinkCutAfter { bytes: self.random.u64(100..20_000), to_broker: self.random.bool() },
            11..13 => {
                let (to_broker, to_client) = *self
                    .random
                    .choice(&[(true, true), (true, false), (false, true)])
                    .expect("there are three");
                Fault::HalfOpen { to_broker, to_client, lasts: self.ms(50..1_500), end: self.perhaps_end() }
            }
            13..15 => Fault::BrokerRestart { away: self.ms(0..600), end: self.perhaps_end() },
            _ => {
                let room = self.random.u32(0..100_000);
                Fault::DiskFull { room, lasts: self.ms(100..800), end: self.perhaps_end() }
            }
        }
    }

    fn end(&mut self) -> End {
        let keep = if self.random.u8(0..3) == 0 { Keep::Some } else { Keep::Nothing };
        match self.random.u8(0..8) {
            0..3 if self.aim != Aim::NoSync => End::Kill,
            7 if self.aim == Aim::Everything => End::StopThenPowerCut(keep),
            _ => End::PowerCut(keep),
        }
    }

    /// Faults seldom come alone.
    fn perhaps_end(&mut self) -> Option<End> {
        self.random.bool().then(|| self.end())
    }

    /// For what is drawn while a fault happens.
    pub(crate) fn random(&mut self) -> &mut fastrand::Rng {
        &mut self.random
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self {
            Fault::End(end) => return write!(f, "{end}"),
            Fault::LinkCut => return write!(f, "link cut"),
            Fault::LinkCutAfter { bytes, to_broker } => {
                let way = if *to_broker { "towards" } else { "from" };
                return write!(f, "link cut {bytes} bytes {way} the broker later");
            }
            Fault::HalfOpen { lasts, end, .. } => {
                write!(f, "link half open for {} ms", lasts.as_millis())?;
                end
            }
            Fault::BrokerRestart { away, end } => {
                write!(f, "broker away for {} ms", away.as_millis())?;
                end
            }
            Fault::DiskFull { room, lasts, end } => {
                write!(f, "disk full in {room} bytes, for {} ms", lasts.as_millis())?;
                end
            }
        };
        match end {
            Some(end) => write!(f, ", and {end}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (words, keep) = match self {
            End::Kill => return write!(f, "kill -9"),
            End::PowerCut(keep) => ("power cut", keep),
            End::StopThenPowerCut(keep) => ("stop, then power cut", keep),
        };
        let kept = if *keep == Keep::Some { " that leaves some sectors" } else { "" };
        write!(f, "{words}{kept}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_its_cycles_again() {
        let draw = |seed, aim| {
            let mut plan = Plan::new(seed, aim);
            (0..200).map(|_| plan.draw()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, Aim::Everything), draw(1, Aim::Everything));
        assert_ne!(draw(1, Aim::Everything), draw(2, Aim::Everything));
    }

    #[test]
    fn every_fault_comes_within_a_hundred_cycles() {
        for seed in 0..20 {
            let mut plan = Plan::new(seed, Aim::Everything);
            let words: String = (0..100).map(|_| format!("{}\n", plan.draw().fault)).collect();
            for part in
                ["kill -9\n", "power cut", "some sectors", "link cut\n", "later", "half open", "broker away"]
            {
                assert!(words.contains(part), "seed {seed} draws no {part:?}");
            }
            assert!(words.contains("disk full") && words.contains("stop, then"), "seed {seed}");
        }
    }

    #[test]
    fn controls_draw_what_finds_them_out() {
        let mut plan = Plan::new(1, Aim::BrokenOrder);
        let ends = |cycle: &Cycle| matches!(cycle.fault, Fault::End(_)) && !cycle.stall.is_zero();
        assert!((0..100).all(|_| ends(&plan.draw())));
        let mut plan = Plan::new(1, Aim::NoSync);
        assert!((0..100).all(|_| matches!(plan.draw().fault, Fault::End(End::PowerCut(_)))));
    }
}
