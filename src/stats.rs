//! The named counters: what was read, accepted, sent, refused and lost. Plain atomics, one set per agent.
//!
//! Invariant (P5): whatever is given up is counted here or in the store's own durable drop counters.

use std::sync::atomic::{AtomicU64, Ordering};

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

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Every counter of the agent that starts at 0 with the process.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub $name: Counter,)* }

        impl Stats {
            /// Every counter with its name, in the order above.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
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
}
