//! Waits for a moment to the microsecond.
//!
//! The silence between two frames is 1.75 to 4 ms on most lines, and tokio's timers count whole milliseconds, upwards:
//! on a fast line that is a tenth of its time. Invariant: never ready before the moment.

use std::io;
use std::os::fd::OwnedFd;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// A timer of the kernel, made when it is first needed.
#[derive(Debug, Default)]
pub struct Silence(Option<AsyncFd<OwnedFd>>);

impl Silence {
    /// Waits until then; by tokio's coarser timer where the kernel gives none.
    pub async fn until(&mut self, moment: Instant) {
        if self.precisely_until(moment).await.is_err() {
            sleep_until(moment).await;
        }
    }

    async fn precisely_until(&mut self, moment: Instant) -> io::Result<()> {
        let timer = match self.0.take() {
            Some(timer) => timer,
            None => new_timer()?,
        };
        let timer = self.0.insert(timer);
        loop {
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let nothing = Timespec { tv_sec: 0, tv_nsec: 0 };
            let once = Itimerspec {
                it_interval: nothing,
                it_value: Timespec::try_from(left).map_err(io::Error::other)?,
            };
            timerfd_settime(timer.get_ref(), TimerfdTimerFlags::empty(), &once)?;
            loop {
                let mut ready = timer.readable().await?;
                let read = ready.try_io(|timer| rustix::io::read(timer, &mut [0; 8]).map_err(Into::into));
                // A wait that was given up may have left the mark behind, but its end was forgotten with the new one.
                let Ok(read) = read else { continue };
                read?;
                break;
            }
        }
    }
}

fn new_timer() -> io::Result<AsyncFd<OwnedFd>> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe, for types that change their descriptor; this is none"
    )]
    AsyncFd::new(timer)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_silence_ends_after_its_moment_and_sooner_than_a_timer_of_tokio() {
        let mut silence = Silence::default();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for n in 0..40 {
            let moment = || Instant::now() + Duration::from_micros(1_000 + n * 37);
            let late = |moment| Instant::now().checked_duration_since(moment).expect("never before");
            let end = moment();
            silence.until(end).await;
            ours.push(late(end));
            let end = moment();
            sleep_until(end).await;
            theirs.push(late(end));
        }
        // In turns, and the one in the middle: a busy machine delays both.
        ours.sort();
        theirs.sort();
        assert!(ours[20] < theirs[20], "{ours:?} against {theirs:?}");
    }

    #[tokio::test]
    async fn a_silence_that_was_given_up_does_not_cut_the_next_one_short() {
        let mut silence = Silence::default();
        for _ in 0..20 {
            let given_up = silence.until(Instant::now() + Duration::from_micros(300));
            tokio::select! { biased; () = tokio::task::yield_now() => {}, () = given_up => {} }
            std::thread::sleep(Duration::from_micros(500));
            let moment = Instant::now() + Duration::from_millis(2);
            silence.until(moment).await;
            assert!(Instant::now() >= moment);
        }
    }
}
