//! Databases that a start must do more with than open them: one of schema 1, and damaged ones.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::command::{CommandStep, Stepped};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{Append, Batch, Settings, Store};
use fieldpost::turn::{Change, Inbound, Offer, OnSessionLoss, RowState};
use rusqlite::Connection;

use crate::cuts::{Extent, Figures, Line, chance, cut_again, pages, roomy, settings, walk};
use crate::disk::{self, Disk, Image, Keep};
use crate::oracle::{START, Verdict, accept, hand_out_all};
use crate::state::{Command, Progress, Row, Session, State};

// ---- schema 1 ------------------------------------------------------------------------------------------

/// Lays out the database of schema 1 in the test data, with exchanges and commands under way; says what it holds.
pub fn schema_1(folder: &Path) -> State {
    let path = folder.join("outbox.db");
    std::fs::write(&path, include_bytes!("../data/store/schema_1.sqlite")).unwrap();
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(&path, copy.path().join("outbox.db")).unwrap();
    let messages = hand_out_all(&roomy(copy.path(), pages(1024)));
    let texts: Vec<&[u8]> = messages.values().map(|kept| &kept.payload[..]).collect();
    let expected: [&[u8]; 7] = [b"two 1", b"two 2", b"two 3", b"one 1", b"one 2", b"one 3", b"bulky"];
    assert_eq!(texts[..6], expected[..6]);
    let db = Connection::open(&path).unwrap();
    db.execute_batch(
        "PRAGMA journal_mode = DELETE;
         INSERT INTO inflight VALUES (1024, 0, 1, 1, 2), (1025, 0, 2, 2, 1), (1026, 0, 3, 3, 1);
         INSERT INTO rx_open VALUES (7, x'2a000000000000000000000000000000');
         INSERT INTO command VALUES
             (1, x'61', '', x'', 1, 0, NULL, NULL, 0, 0, 1, 2),
             (2, x'62', 'command', x'62', 1, 0, NULL, NULL, 0, 0, 1, 1),
             (3, NULL, 'command', x'63', 1, 0, NULL, NULL, 0, 0, 1, 0);",
    )
    .unwrap();
    drop(db);
    let row = |seq, state| Row { place: (Lane::Alarm, seq), send_no: seq, state };
    let session = Session {
        rows: BTreeMap::from([
            (1024, row(1, RowState::Received)),
            (1025, row(2, RowState::Published)),
            (1026, row(3, RowState::Published)),
        ]),
        rx_open: BTreeMap::from([(7, 42)]),
        ..Session::default()
    };
    let command = |payload: &'static str, id: Option<&str>, progress| Command {
        payload: Bytes::from_static(payload.as_bytes()),
        id: id.map(str::to_owned),
        progress,
    };
    let owner = ("127.0.0.1:9".to_owned(), "press-shop-1".to_owned());
    State {
        next: [4, 4, 2],
        waiting: messages,
        sessions: BTreeMap::from([(owner.clone(), session)]),
        owner,
        commands: BTreeMap::from([
            (1, command("", Some("a"), Progress::Answered)),
            (2, command("b", Some("b"), Progress::Begun)),
            (3, command("c", None, Progress::Recorded)),
        ]),
        next_command: 4,
        boot: 1,
        ..State::default()
    }
}

// ---- salvage -------------------------------------------------------------------------------------------

/// Where the damage is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// After an unclean stop, by the check of the start.
    AtStart,
    /// After a clean one, by the check behind the start.
    BehindStart,
}

/// Messages of a store with everything in it.
const MESSAGES: usize = 120;
/// What was answered, begun, and recorded when the damage came.
const IDS: [&str; 3] = ["answered", "begun", "recorded"];

fn message(lane: Lane, qos: Qos, text: String) -> Message {
    Message {
        topic: Topic::new("some").unwrap(),
        qos,
        retain: false,
        lane,
        at: START,
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(text.into()),
    }
}

fn text(number: usize) -> String {
    let mut random = Rng::with_seed(number as u64);
    let noise: String = (0..180).map(|_| random.alphanumeric()).collect();
    format!("{number:03} {noise}")
}

/// A store with messages of every lane, some in flight, and commands as far as they can come; left as a crash or a
/// stop leaves it.
fn filled(page_bytes: u64, found: Found) -> Image {
    let folder = tempfile::tempdir().unwrap();
    disk::record(folder.path(), None);
    let mut store = Store::open(settings(folder.path(), pages(page_bytes))).unwrap();
    store.begin(("broker", "client"), OnSessionLoss::Republish, &[], START).unwrap();
    for batch in 0..MESSAGES / 4 {
        let (lane, qos) = (Lane::ALL[batch % 3], [Qos::AtLeastOnce, Qos::ExactlyOnce][batch % 2]);
        let messages = (0..4).map(|n| message(lane, qos, text(batch * 4 + n))).collect();
        let append = Append { messages, closes: Vec::new() };
        let committed = store.commit(Batch { appends: vec![append], ..Batch::default() }, START).unwrap();
        assert_eq!(committed.appends, [Ok(())]);
    }
    let inbound = |id: &&str| Change::Inbound {
        id: None,
        inbound: Inbound {
            topic: Topic::new("command").unwrap(),
            payload: Bytes::copy_from_slice(id.as_bytes()),
            qos: Qos::AtLeastOnce,
            retain: false,
            response_topic: None,
            correlation_data: None,
        },
    };
    let changes = IDS.iter().map(inbound).collect();
    let steps = vec![
        CommandStep::Begin { number: 1, id: IDS[0].to_owned() },
        CommandStep::Begin { number: 2, id: IDS[1].to_owned() },
    ];
    let offer = Offer {
        ids: (1024..1034).filter_map(PacketId::new).collect(),
        qos2_room: 5,
        max_bytes: usize::MAX,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    };
    store.commit(Batch { changes, steps, offer: Some(offer), ..Batch::default() }, START).unwrap();
    let answer = Box::new(message(Lane::Alarm, Qos::AtLeastOnce, "the answer".to_owned()));
    let steps = vec![CommandStep::Answer { number: 1, id: Some(IDS[0].to_owned()), answer }];
    store.commit(Batch { steps, ..Batch::default() }, START).unwrap();
    store.close();
    let settings = settings(folder.path(), pages(page_bytes));
    let mut running = (found == Found::AtStart).then(|| Store::open(settings).unwrap());
    if let Some(store) = &mut running {
        accept(store, vec![text(MESSAGES)]);
    }
    let tape = disk::stop();
    let mut disk = Disk::new(&tape.before);
    tape.ops.iter().for_each(|op| disk.apply(op));
    disk.cut(Keep::Everything, &mut Rng::with_seed(0))
}

/// A page that holds some message is gone from the database; and what a salvage makes of that.
fn damaged(page_bytes: u64, found: Found) -> (Image, Rescued) {
    let whole = filled(page_bytes, found);
    let pages = (1..whole["outbox.db"].len() / page_bytes as usize).rev();
    let damages = pages.filter_map(|number| {
        let mut image = whole.clone();
        let page = &mut image.get_mut("outbox.db")?[number * page_bytes as usize..][..page_bytes as usize];
        let messages = 0..MESSAGES / 2;
        // One of a table's leaves (SQLite file format, 1.6).
        if page[0] != 0x0d || messages.rev().all(|n| place_of(page, &text(n).as_bytes()[..8]).is_none()) {
            return None;
        }
        page.fill(0);
        let folder = tempfile::tempdir().unwrap();
        disk::lay_out(folder.path(), &image);
        Some((image, rescued(&roomy(folder.path(), crate::cuts::pages(page_bytes))).unwrap()))
    });
    // What a message has left behind on a page is no loss.
    let mut damages = damages.filter(|(_, rescued)| rescued.dropped > 0);
    damages.next().expect("a page with messages is missed")
}

fn place_of(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

/// What a salvage leaves.
#[derive(Debug, PartialEq, Eq)]
struct Rescued {
    texts: BTreeSet<Bytes>,
    dropped: u64,
    recorded: Vec<(u64, Bytes)>,
    interrupted: Vec<(u64, Option<String>)>,
    /// Of [`IDS`]: may not begin again.
    known: Vec<bool>,
}

/// Starts, checks everything as the store's thread does behind the start, and hands out what is there.
fn rescued(settings: &Settings) -> Result<Rescued, String> {
    let words = |error: fieldpost::store::StoreError| error.to_string();
    let mut store = Store::open(settings.clone()).map_err(words)?;
    while store.check_next().unwrap_or(false) {}
    let look = store.look(START).map_err(words)?;
    let recorded = store.recorded(0, 100, START).map_err(words)?;
    let interrupted = store.interrupted(START).map_err(words)?;
    let newest = store.newest_command();
    let again = |payload: &str| Change::Inbound {
        id: None,
        inbound: Inbound {
            topic: Topic::new("command").expect("a topic"),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            qos: Qos::AtLeastOnce,
            retain: false,
            response_topic: None,
            correlation_data: None,
        },
    };
    let changes = IDS.iter().map(|id| again(id)).collect();
    store.commit(Batch { changes, ..Batch::default() }, START).map_err(words)?;
    let begin = |(number, id): (u64, &&str)| CommandStep::Begin { number, id: (*id).to_owned() };
    let steps = (newest + 1..).zip(&IDS).map(begin).collect();
    let stepped = store.commit(Batch { steps, ..Batch::default() }, START).map_err(words)?.steps;
    drop(store);
    let messages = hand_out_all(settings);
    let count = messages.len();
    let texts: BTreeSet<Bytes> = messages.into_values().map(|kept| kept.payload).collect();
    if texts.len() != count {
        return Err("a message is there twice".to_owned());
    }
    Ok(Rescued {
        texts,
        dropped: look.dropped.iter().map(|(.., count)| count).sum(),
        recorded: recorded.into_iter().map(|of| (of.number, of.inbound.payload)).collect(),
        interrupted: interrupted.into_iter().map(|of| (of.number, of.id)).collect(),
        known: stepped.iter().map(|stepped| *stepped == Stepped::Repeated).collect(),
    })
}

/// The damaged database is set aside once, with what was in it, and nothing of the salvage is left.
fn untidy(folder: &Path, needles: &[Vec<u8>]) -> Option<String> {
    let names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    let (logs, aside): (Vec<_>, Vec<_>) =
        names.iter().filter(|name| name.contains(".corrupt-")).partition(|name| name.ends_with("-wal"));
    if aside.len() != 1 || names.iter().any(|name| name.contains(".salvage")) {
        return Some(format!("the folder holds {names:?}"));
    }
    let files: Vec<Vec<u8>> =
        aside.iter().chain(&logs).map(|name| std::fs::read(folder.join(name)).unwrap()).collect();
    let gone = needles.iter().find(|needle| files.iter().all(|bytes| place_of(bytes, needle).is_none()))?;
    Some(format!("{:?} is not in what was set aside", String::from_utf8_lossy(gone)))
}

/// The power fails at every operation of a start that finds damage, and of what is accepted afterwards.
pub fn cut_during_a_salvage(page_bytes: u64, found: Found, seed: u64, extent: Extent) -> Line {
    let began = Instant::now();
    let (image, undisturbed) = damaged(page_bytes, found);
    // The answer is a message too, and so is what stands in the log.
    let (count, all) =
        (undisturbed.texts.len() as u64, MESSAGES as u64 + 1 + u64::from(found == Found::AtStart));
    assert!(count > 90 && count + undisturbed.dropped == all, "{count} are left");
    assert_eq!(undisturbed.known, [true, true, false]);
    let files: Vec<&Vec<u8>> = image.values().collect();
    let needles: Vec<Vec<u8>> = (0..MESSAGES)
        .map(|number| text(number).into_bytes()[..24].to_vec())
        .filter(|needle| files.iter().any(|bytes| place_of(bytes, needle).is_some()))
        .step_by(20)
        .collect();
    assert!(needles.len() > 3);

    let folder = tempfile::tempdir().unwrap();
    disk::lay_out(folder.path(), &image);
    disk::record(folder.path(), None);
    let mut store = Store::open(settings(folder.path(), pages(page_bytes))).unwrap();
    while store.check_next().unwrap_or(false) {}
    assert!(store.look(START).unwrap().damage.is_some());
    accept(&mut store, vec!["accepted afterwards".to_owned()]);
    let answered = disk::position();
    store.close();
    let tape = disk::stop();

    let stride = extent.pick(9, 1);
    let figures = walk(&tape, extent.workers(), false, |figures: &mut Figures, point, disk, folder| {
        if !(point as u64 + seed).is_multiple_of(stride) {
            return;
        }
        let settings = roomy(folder, pages(page_bytes));
        let mut random = chance(seed, point);
        for keep in Keep::ALL {
            figures.points += 1;
            if disk.is_settled() && keep != Keep::Nothing {
                continue;
            }
            disk::lay_out(folder, &disk.cut(keep, &mut random));
            figures.starts += 1;
            if random.usize(0..6) == 0 {
                figures.twice += 1;
                cut_again(&settings, &mut random);
            }
            let mut verdict = judge(rescued(&settings), &undisturbed, point >= answered);
            if let Some(untidy) = untidy(folder, &needles) {
                verdict.add(Verdict { wrong: 1, words: vec![untidy], ..Verdict::default() });
            }
            figures.judged(verdict, &format!("operation {point}, {keep:?} kept"));
        }
    });
    let name = match found {
        Found::AtStart => "salvage, damage found at the start",
        Found::BehindStart => "salvage, damage found behind the start",
    };
    Line::new(name, page_bytes, began, (1, tape.ops.len()), figures)
}

fn judge(rescued: Result<Rescued, String>, undisturbed: &Rescued, answered: bool) -> Verdict {
    let rescued = match rescued {
        Ok(rescued) => rescued,
        Err(error) => return Verdict { corrupt: 1, words: vec![error], ..Verdict::default() },
    };
    let mut texts = rescued.texts.clone();
    let afterwards = texts.remove(&b"accepted afterwards"[..]);
    let lost = undisturbed.texts.difference(&texts).count() + usize::from(answered && !afterwards);
    // What nobody accepted.
    let mut wrong = texts.difference(&undisturbed.texts).count();
    let expected = Rescued { texts: rescued.texts.clone(), ..undisturbed.but_texts() };
    wrong += usize::from(rescued != expected);
    let words = if lost + wrong > 0 {
        vec![format!(
            "lost {lost}, and of the rest {:?}, should be {:?}",
            rescued.but_texts(),
            undisturbed.but_texts()
        )]
    } else {
        Vec::new()
    };
    Verdict { lost, wrong, words, ..Verdict::default() }
}

impl Rescued {
    fn but_texts(&self) -> Rescued {
        Rescued {
            texts: BTreeSet::new(),
            dropped: self.dropped,
            recorded: self.recorded.clone(),
            interrupted: self.interrupted.clone(),
            known: self.known.clone(),
        }
    }
}
