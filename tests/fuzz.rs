//! The fuzz targets over their corpora, on stable: what fuzzing has found stays found.
//!
//! `fuzz/corpus/TARGET` holds what the fuzzer kept; a file there named `found-*` once broke its target.

#![allow(clippy::unwrap_used)]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

/// Every file of a target's corpus, and mutations of it by a fixed seed.
fn run(name: &str, target: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut random = fastrand::Rng::with_seed(1);
    let mut files = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let mut bytes = fs::read(entry.unwrap().path()).unwrap();
        target(&bytes);
        files += 1;
        for _ in 0..8 {
            if !bytes.is_empty() {
                let at = random.usize(..bytes.len());
                bytes[at] ^= 1 << random.u8(..8);
                target(&bytes);
            }
        }
    }
    println!("{name}: {files} files");
    assert!(files > 0, "the corpus {} is empty", folder.display());
}

#[test]
fn any_configuration_is_checked_or_refused_in_words() {
    run("config", targets::config);
}

#[test]
fn any_topic_template_renders_to_topics_that_can_be_published() {
    run("topic", targets::topic);
}

#[test]
fn no_command_is_carried_out_beyond_what_is_allowed() {
    run("command", targets::command);
}

#[test]
fn any_registers_are_a_finite_value_or_a_fault() {
    run("registers", targets::registers);
}

#[test]
fn any_replies_of_a_server_are_a_value_they_hold_or_a_fault() {
    run("reply", targets::reply);
}

#[test]
fn what_is_read_of_a_segment_is_what_was_written() {
    run("segment", targets::segment);
}

#[test]
fn any_bytes_of_a_broker_are_packets_or_an_error() {
    run("inbound", targets::inbound);
}

#[test]
fn nothing_a_broker_says_breaks_the_order_of_delivery() {
    run("session", targets::session);
}

/// How many files of a corpus the negative control of its target notices.
fn noticed(name: &str, broken: fn(&[u8])) -> usize {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let files = fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
    let (mut caught, mut all) = (0, 0);
    for bytes in files {
        all += 1;
        caught += usize::from(std::panic::catch_unwind(|| broken(&bytes)).is_err());
    }
    println!("{name}: {caught} of {all} files notice it");
    caught
}

/// Negative controls: the corpora reach deep enough to see what is broken.
#[test]
fn the_corpus_notices_a_pubrel_that_leaves_before_its_commit() {
    assert!(noticed("session", targets::broken_session) > 0);
}

#[test]
fn the_corpus_notices_damage_under_a_good_checksum() {
    assert!(noticed("segment", targets::forged_segment) > 0);
}

#[test]
fn the_corpus_notices_a_value_that_no_reply_held() {
    assert!(noticed("reply", targets::misread_reply) > 0);
}
