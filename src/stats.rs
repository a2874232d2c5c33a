//! The named counters: what was read, accepted, sent, refused and lost, and how long commits took. Plain atomics, one
//! set per agent.
//!
//! Invariant (P5): whatever is given up is counted here or in the store's own durable drop counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A counter that only goes up.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Takes over a count that is kept elsewhere.
    pub fn raise_to(&self, n: u64) {
        self.0.fetch_max(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of the steps of [`Durations`], in microseconds: from a fast disk's sync to a failing card's.
const STEPS_US: [u64; 13] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    10_000_000,
];

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Durations {
    steps: [Counter; STEPS_US.len()],
    longer: Counter,
    total_us: Counter,
}

impl Durations {
    /// Counts one.
    pub fn count(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let step = STEPS_US.iter().position(|bound| us <= *bound);
        step.map_or(&self.longer, |step| &self.steps[step]).increment();
        self.total_us.add(us);
    }

    /// For each upper bound in microseconds, how many took no longer.
    pub fn up_to(&self) -> Vec<(u64, u64)> {
        let mut sum = 0;
        let add = |(bound, step): (&u64, &Counter)| {
            sum += step.get();
            (*bound, sum)
        };
        STEPS_US.iter().zip(&self.steps).map(add).collect()
    }

    /// How many there were.
    pub fn number(&self) -> u64 {
        self.steps.iter().map(Counter::get).sum::<u64>() + self.longer.get()
    }

    /// All of them together, in microseconds.
    pub fn total_us(&self) -> u64 {
        self.total_us.get()
    }
}

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// What the agent counts from 0 on with each start.
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[doc = $doc])* pub $name: Counter,)*
            /// Messages the store accepted, in the order of [`Lane::ALL`].
            ///
            /// [`Lane::ALL`]: crate::message::Lane::ALL
            pub accepted_by_lane: [Counter; 3],
            /// Messages whose last acknowledgement arrived, in the same order.
            pub delivered_by_lane: [Counter; 3],
            /// How long the store's commits took.
            pub commit_times: Durations,
        }

        impl Stats {
            /// Every named counter, in the order above.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }

            /// What a counter counts, in words.
            pub fn meaning(name: &str) -> Option<&'static str> {
                const MEANINGS: &[(&str, &str)] = &[$((stringify!($name), concat!($($doc),*)),)*];
                MEANINGS.iter().find(|(other, _)| *other == name).map(|(_, meaning)| meaning.trim_start())
            }
        }
    };
}

counters! {
    /// Samples taken from devices, good or bad.
    samples_read,
    /// Samples that were bad.
    samples_bad,
    /// Samples within their dead band.
    samples_within_deadband,
    /// Readings thrown away because the pipeline was full: the store could not keep up.
    readings_overrun,
    /// Due times that passed while a unit was still being read.
    polls_skipped,
    /// Transactions of the database.
    commits,
    /// Microseconds they took, syncs included.
    commit_us,
    /// Messages the store accepted.
    messages_accepted,
    /// Messages the store did not accept.
    messages_not_accepted,
    /// QoS 0 messages sent.
    qos0_sent,
    /// QoS 0 messages thrown away because the link was down or full.
    qos0_dropped,
    /// Messages whose last acknowledgement arrived.
    messages_delivered,
    /// Acknowledged with 0x10: nobody is subscribed.
    no_matching_subscribers,
    /// PUBLISH packets sent with DUP.
    resent_with_dup,
    /// Messages that may have been delivered twice, because the broker lost the session or said 0x92.
    possibly_doubled,
    /// Messages that may be lost, because the broker lost the session and the policy is `drop`.
    possibly_lost,
    /// Messages whose fate only the broker knew and could not tell: PUBCOMP 0x92, or a session no canary vouched for.
    ambiguous,
    /// Messages in flight that had to be abandoned; whether the broker had them is unknown.
    abandoned,
    /// Messages the broker refused for now.
    refused_for_now,
    /// Messages given up after a refusal.
    dead_lettered,
    /// Dead letters put into the queue again by `fieldpost queue requeue`.
    requeued,
    /// Messages that overtook a refused one of their topic because they were already in flight.
    order_overtaken,
    /// Messages published at a lower QoS or without retain because the broker allows no more.
    downgraded,
    /// Of those, at a lower QoS.
    downgraded_qos,
    /// Of those, without retain; presence and unit states too.
    downgraded_retain,
    /// Connections begun without a Will, or with one that is not retained.
    downgraded_will,
    /// Messages of a backlog published without retain, because a newer one of their topic went before.
    retain_cleared,
    /// The same, where it is not known whether one did: there are too many topics.
    retain_cleared_unknown,
    /// Acknowledgements that fit nothing in flight.
    acks_unexpected,
    /// Inbound messages recorded.
    inbound_recorded,
    /// Inbound messages recognised as repeats.
    inbound_repeated,
    /// Inbound messages refused: too large, or the inbox full.
    inbound_refused,
    /// Bytes written to the broker's TCP connections, TLS and failed attempts included.
    link_bytes_sent,
    /// Bytes read from them.
    link_bytes_received,
    /// Commands taken from the inbox.
    commands_received,
    /// Commands carried out and read back.
    commands_done,
    /// Commands refused, those over the limit included.
    commands_refused,
    /// Commands whose time was over.
    commands_expired,
    /// Commands that were certainly not carried out as asked.
    commands_failed,
    /// Commands that may or may not have been carried out.
    commands_unknown,
    /// Commands with an id that was known already: neither carried out nor answered again.
    commands_repeated,
    /// Commands above `max_per_second`.
    commands_over_limit,
    /// Commands' steps tried again, because the database failed or had no room even above the quota.
    command_steps_retried,
    /// Connections to the broker that reached CONNACK with success.
    connects,
    /// Attempts to connect that failed.
    connect_failures,
    /// Connections closed because the broker broke the protocol.
    protocol_errors,
    /// Times the next broker of the list was tried because the one before had failed for too long.
    failovers,
    /// Times a broker that stands earlier in the list was back and messages went there again.
    failbacks,
    /// Corrections of the clock given up because the store took none of too many.
    clock_corrections_dropped,
    /// Sessions the broker turned out to have lost.
    sessions_lost,
    /// Log lines left out, because one place in the program had too many.
    log_lines_left_out,
    /// HTTP requests answered.
    http_requests,
    /// HTTP connections turned away, because there were `max_connections`.
    http_connections_refused,
    /// HTTP requests given up, because their headers were malformed, too large, or took longer than `read_timeout`.
    http_headers_refused,
    /// HTTP requests refused, because their body was too large or took longer than `read_timeout`.
    http_bodies_refused,
    /// HTTP requests told to try again later, because too many or too large ones were waiting.
    http_busy,
    /// HTTP requests without the right token.
    http_unauthorized,
    /// HTTP requests that looked like a web page's.
    http_forbidden,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_up_to_each_bound() {
        let durations = Durations::default();
        for us in [0, 500, 501, 20_000_000] {
            durations.count(Duration::from_micros(us));
        }
        assert_eq!(durations.up_to()[..3], [(500, 2), (1_000, 3), (2_500, 3)]);
        assert_eq!(durations.up_to().last(), Some(&(10_000_000, 3)));
        assert_eq!((durations.number(), durations.total_us()), (4, 20_001_001));
    }

    #[test]
    fn every_counter_says_what_it_counts() {
        for (name, _) in Stats::default().all() {
            let meaning = Stats::meaning(name).unwrap_or_default();
            assert!(meaning.ends_with('.') && !meaning.starts_with(' '), "{name}: {meaning:?}");
        }
        assert_eq!(Stats::meaning("messages_accepted"), Some("Messages the store accepted."));
    }
}
