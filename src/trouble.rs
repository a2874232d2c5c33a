//! When something that lasts or comes back is said in the log: at once, then at growing intervals with a count, and
//! its end with the total. Pure.
//!
//! Invariant: each occurrence is said, or is counted in what is said later; and whatever happens how often, one
//! [`Trouble`] is said at most [`DAILY_MAX`] times in a day. A log on flash that a dead link fills helps nobody.

use std::fmt;

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;

/// How long it is not said again, after each time that it was.
const PAUSES_MS: [u64; 5] = [MINUTE_MS, 10 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, 24 * HOUR_MS];
/// What begins again is said after this long at the latest, or nobody would learn that it lasts this time.
const AGAIN_MS: u64 = HOUR_MS;
/// After so long without it, it is said at once.
const CALM_MS: u64 = HOUR_MS;
/// After so long without it, it is new.
const FORGOTTEN_MS: u64 = 24 * HOUR_MS;
/// Different words for it that are each said at once; more of them follow the intervals.
const WORDS_MAX: usize = 4;
/// Nothing can make one trouble be said more often in 24 hours, its ends included: at most one beginning in an hour by
/// [`AGAIN_MS`] and [`CALM_MS`], those of the first hour, each other word, and as many ends.
pub const DAILY_MAX: usize = 2 * (24 + 3 + WORDS_MAX);

/// One thing that can go wrong at one place, as far as the log is concerned. Times are in milliseconds of any one
/// monotonic clock.
#[derive(Debug, Clone, Default)]
pub struct Trouble {
    /// While it lasts.
    lasting: Option<Lasting>,
    /// Occurrences since it was last said.
    unsaid: u64,
    said_ms: Option<u64>,
    /// When it may be said again.
    next_ms: u64,
    /// How many intervals have passed.
    pauses: usize,
    /// The last occurrence, or the last end.
    last_ms: Option<u64>,
    /// The words it was said with.
    words: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
struct Lasting {
    since_ms: u64,
    times: u64,
    was_said: bool,
}

/// What is said beside the words. It is written behind them, and is nothing for what has just begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct More {
    /// Occurrences since it was last said, this one included.
    pub times: u64,
    /// How long ago that was; `None`: this is the first time.
    pub within_ms: Option<u64>,
}

impl More {
    /// The occurrences as things: "1,204 messages in the last 10 min 0 s".
    pub fn of(&self, thing: &str) -> String {
        let within = self.within_ms.map_or(String::new(), |ms| format!(" in the last {}", span(ms)));
        counted(self.times, thing) + &within
    }
}

impl fmt::Display for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.within_ms, self.times) {
            (None, _) => Ok(()),
            (Some(ms), 1) => write!(f, " (once more in the last {})", span(ms)),
            (Some(ms), times) => write!(f, " ({} times in the last {})", grouped(times), span(ms)),
        }
    }
}

/// What there was, now that it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// From its first occurrence to its end, in milliseconds.
    pub lasted_ms: u64,
    /// Its occurrences.
    pub times: u64,
}

impl Trouble {
    /// It happened; `Some`: say so. `words` tell one reason from another: a new one is said at once.
    pub fn happened(&mut self, words: &str, now_ms: u64) -> Option<More> {
        self.happened_times(words, 1, now_ms)
    }

    /// It happened so many times at once.
    pub fn happened_times(&mut self, words: &str, times: u64, now_ms: u64) -> Option<More> {
        let begins = self.lasting.is_none();
        let quiet_ms = self.last_ms.map_or(u64::MAX, |last_ms| now_ms.saturating_sub(last_ms));
        if quiet_ms >= CALM_MS {
            self.next_ms = now_ms;
        } else if let (true, Some(said_ms)) = (begins, self.said_ms) {
            self.next_ms = self.next_ms.min(said_ms.saturating_add(AGAIN_MS));
        }
        if quiet_ms >= FORGOTTEN_MS {
            self.pauses = 0;
            self.words.clear();
        }
        self.last_ms = Some(now_ms);
        self.unsaid += times;
        let lasting = self.lasting.get_or_insert(Lasting { since_ms: now_ms, times: 0, was_said: false });
        lasting.times += times;
        let is_new = self.words.len() < WORDS_MAX && !self.words.iter().any(|known| known == words);
        let is_due = now_ms >= self.next_ms;
        if !is_new && !is_due {
            return None;
        }
        lasting.was_said = true;
        if is_new {
            self.words.push(words.to_owned());
        }
        if !is_due {
            // What was unsaid before had other words, and is told with those that are due next.
            self.unsaid -= times;
            return Some(More { times, within_ms: None });
        }
        let is_first = begins && self.unsaid == times;
        let within_ms = self.said_ms.filter(|_| !is_first).map(|said_ms| now_ms.saturating_sub(said_ms));
        self.next_ms = now_ms.saturating_add(PAUSES_MS[self.pauses.min(PAUSES_MS.len() - 1)]);
        self.pauses += 1;
        self.said_ms = Some(now_ms);
        Some(More { times: std::mem::take(&mut self.unsaid), within_ms })
    }

    /// It is over; `Some`: say so. An end of which no beginning was said is kept quiet too.
    pub fn ended(&mut self, now_ms: u64) -> Option<Ended> {
        let Lasting { since_ms, times, was_said } = self.lasting.take()?;
        self.last_ms = Some(now_ms);
        if !was_said {
            return None;
        }
        (self.unsaid, self.said_ms) = (0, Some(now_ms));
        Some(Ended { lasted_ms: now_ms.saturating_sub(since_ms), times })
    }

    /// Whether it lasts.
    pub fn is_on(&self) -> bool {
        self.lasting.is_some()
    }
}

/// A duration in its two largest units.
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A number with a comma between its thousands.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A number of things: "1 attempt", "1,204 attempts".
pub fn counted(count: u64, thing: &str) -> String {
    format!("{} {thing}{}", grouped(count), if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND_MS: u64 = 1000;
    const DAY_MS: u64 = 24 * HOUR_MS;

    #[test]
    fn the_first_is_said_at_once_and_repetitions_are_counted_at_growing_intervals() {
        let mut trouble = Trouble::default();
        let mut said = Vec::new();
        for now_ms in (0..2 * DAY_MS).step_by(SECOND_MS as usize) {
            if let Some(more) = trouble.happened("refused", now_ms) {
                said.push((now_ms / SECOND_MS, more.to_string()));
            }
        }
        let words = [
            (0, ""),
            (60, " (60 times in the last 1 min 0 s)"),
            (660, " (600 times in the last 10 min 0 s)"),
            (4_260, " (3,600 times in the last 1 h 0 min)"),
            (25_860, " (21,600 times in the last 6 h 0 min)"),
            (112_260, " (86,400 times in the last 1 d 0 h)"),
        ];
        assert_eq!(said, words.map(|(at, words)| (at, words.to_owned())));
        let ended = trouble.ended(2 * DAY_MS).expect("it was said");
        assert_eq!(ended, Ended { lasted_ms: 2 * DAY_MS, times: 172_800 });
        assert_eq!((trouble.ended(2 * DAY_MS), trouble.is_on()), (None, false));
    }

    #[test]
    fn another_reason_is_said_at_once_but_not_without_end() {
        let mut trouble = Trouble::default();
        assert!(trouble.happened("refused", 0).is_some());
        assert!(trouble.happened("refused", 1).is_none());
        assert_eq!(trouble.happened("no route", 2), Some(More { times: 1, within_ms: None }));
        assert!(trouble.happened("refused", 3).is_none(), "not new any more");
        let said = (0..1000).filter(|n| trouble.happened(&format!("port {n}"), 4).is_some()).count();
        assert_eq!(said, WORDS_MAX - 2);
        let due = trouble.happened("refused", MINUTE_MS).expect("due");
        assert_eq!(due.times, 2 + 998 + 1, "what was not said is counted, what was said is not");
    }

    #[test]
    fn what_comes_and_goes_is_said_as_one_trouble() {
        let mut trouble = Trouble::default();
        let (mut begun, mut ended) = (0, 0);
        for now_ms in (0..DAY_MS).step_by(10 * SECOND_MS as usize) {
            begun += usize::from(trouble.happened("closed", now_ms).is_some());
            ended += usize::from(trouble.ended(now_ms + 5 * SECOND_MS).is_some());
        }
        assert_eq!((begun, ended), (26, 26), "at 0, 1 and 11 minutes, then each hour");
    }

    #[test]
    fn an_outage_after_many_short_ones_is_said_within_an_hour() {
        let mut trouble = Trouble::default();
        let mut now_ms = 0;
        for _ in 0..20_000 {
            now_ms += 10 * SECOND_MS;
            trouble.happened("closed", now_ms);
            trouble.ended(now_ms + SECOND_MS);
        }
        let begins_ms = now_ms + 10 * SECOND_MS;
        let said =
            (begins_ms..).step_by(SECOND_MS as usize).find(|ms| trouble.happened("closed", *ms).is_some());
        assert!(said.expect("it is said") - begins_ms <= HOUR_MS);
        assert!(trouble.ended(begins_ms + DAY_MS).is_some());
    }

    #[test]
    fn what_was_quiet_for_an_hour_is_said_at_once() {
        let mut trouble = Trouble::default();
        for now_ms in (0..4_300 * SECOND_MS).step_by(SECOND_MS as usize) {
            trouble.happened("refused", now_ms);
        }
        let at_ms = |seconds| 4_299 * SECOND_MS + seconds * SECOND_MS;
        assert!(trouble.happened("refused", at_ms(3_599)).is_none(), "the next would be after six hours");
        let more = trouble.happened("refused", at_ms(3_599 + 3_600)).expect("at once");
        assert_eq!(more.times, 39 + 2);
        assert!(trouble.ended(at_ms(7_200)).is_some());
        let anew = trouble.happened("refused", at_ms(7_200) + 2 * DAY_MS).expect("new");
        assert_eq!(anew, More { times: 1, within_ms: None });
        assert!(
            trouble.happened("refused", at_ms(7_260) + 2 * DAY_MS).is_some(),
            "the intervals are short again"
        );
    }

    #[test]
    fn durations_and_numbers_are_for_people() {
        let words = [(0, "0 s"), (59_999, "59 s"), (86_580_000, "1 d 0 h"), (3_780_000, "1 h 3 min")];
        assert_eq!(words.map(|(ms, _)| span(ms)), words.map(|(_, words)| words));
        assert_eq!(
            (counted(1, "attempt"), counted(1_204, "attempt")),
            ("1 attempt".into(), "1,204 attempts".into())
        );
    }

    proptest! {
        /// Whatever happens and ends when, in whatever words.
        #[test]
        fn no_day_of_a_trouble_has_more_lines_than_its_limit(
            steps in prop::collection::vec((0u64..4 * HOUR_MS, 0u8..8, any::<bool>()), 1..4_000),
            fast in 1u64..5_000,
        ) {
            let mut trouble = Trouble::default();
            let (mut now_ms, mut times, mut told) = (0, 0, 0);
            let mut lines = Vec::new();
            for (pause, words, ends) in steps {
                now_ms += pause / fast;
                times += 1;
                let more = trouble.happened(&words.to_string(), now_ms);
                told += more.map_or(0, |more| more.times);
                lines.extend(more.map(|_| now_ms));
                if ends && trouble.ended(now_ms).is_some() {
                    lines.push(now_ms);
                }
            }
            prop_assert!(told <= times, "nothing is told twice");
            for (at, from) in lines.iter().enumerate() {
                let day = lines[at..].iter().take_while(|ms| **ms < from + DAY_MS).count();
                prop_assert!(day <= DAILY_MAX, "{day} lines from {from}");
            }
        }
    }
}
