-- The database's contract. user_version 2; migrate_2.sql makes it of version 1.
-- One connection writes it; every table but `segment` stays within a few pages.

CREATE TABLE meta (
    one             INTEGER PRIMARY KEY CHECK (one = 1),
    epoch           INTEGER NOT NULL,           -- goes up whenever sequence numbers might repeat
    boot            INTEGER NOT NULL,           -- starts of the agent on this database
    machine         TEXT NOT NULL,              -- the machine the database belongs to
    kernel_boot     INTEGER NOT NULL,           -- boots of the machine seen so far
    kernel_boot_id  TEXT NOT NULL               -- the last one's own name
);

CREATE TABLE lane (
    lane            INTEGER PRIMARY KEY,        -- 0 alarm, 1 normal, 2 bulk
    next_seq        INTEGER NOT NULL,           -- never goes back, or a drained queue would number from 1 again
    messages        INTEGER NOT NULL,           -- not yet done
    bytes           INTEGER NOT NULL            -- of the lane's segments
);

-- The records of one lane and one commit. The newest commit is at the end of its lane, so that an insert
-- touches the right edge of the tree only, and a finished segment is one DELETE.
CREATE TABLE segment (
    id              INTEGER PRIMARY KEY,        -- lane << 56 | number of the first record
    count           INTEGER NOT NULL,
    epoch           INTEGER NOT NULL,
    kernel_boot     INTEGER NOT NULL,
    accepted_ms     INTEGER NOT NULL,           -- wall clock
    accepted_mono   INTEGER NOT NULL,           -- milliseconds since that boot
    packing         INTEGER NOT NULL,           -- 0 plain, 1 LZ4
    body            BLOB NOT NULL,
    synchronised    INTEGER NOT NULL DEFAULT 0  -- whether the wall clock was, when they were accepted
);

-- Which records of a segment are done; a segment without a row has none.
CREATE TABLE progress (
    segment         INTEGER PRIMARY KEY,
    done            BLOB NOT NULL               -- bit n: the n-th record
);

-- QoS 2 messages whose exchange has begun.
CREATE TABLE inflight (
    owner           INTEGER NOT NULL,           -- of which session
    pkid            INTEGER NOT NULL CHECK (pkid BETWEEN 1 AND 65535),
    lane            INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    send_no         INTEGER NOT NULL,           -- order of sending, across lanes
    state           INTEGER NOT NULL CHECK (state IN (1, 2, 3, 4)), -- published, received, abandoned, moved
    retain          INTEGER,                    -- the flag it was sent with; NULL: as the record says
    PRIMARY KEY (owner, pkid)
) WITHOUT ROWID;

-- The newest retained message of a topic that was sent before older ones of its lane (live first).
CREATE TABLE retained_ahead (
    lane            INTEGER NOT NULL,
    topic           TEXT NOT NULL,
    seq             INTEGER NOT NULL,
    PRIMARY KEY (lane, topic)
) WITHOUT ROWID;

-- The sessions that rows belong to, one for each broker and client identifier, and what is known of them.
CREATE TABLE session (
    owner           INTEGER PRIMARY KEY,
    broker          TEXT NOT NULL,
    client_id       TEXT NOT NULL,
    uncertain       INTEGER NOT NULL,           -- an "absent" may have been missed
    clean_start     INTEGER NOT NULL,           -- the broker's session must be discarded first
    canary          INTEGER NOT NULL            -- the canary's echo has been seen
);

-- What is used of the byte budget; empty where there never was one.
CREATE TABLE budget (
    one             INTEGER PRIMARY KEY CHECK (one = 1),
    per             TEXT NOT NULL,              -- day or month
    period          INTEGER,                    -- which one since the year 0 or 1970; NULL: by running time
    used            INTEGER NOT NULL,           -- bytes
    ran_ms          INTEGER NOT NULL            -- running time in it
);

-- Inbound QoS 2 messages that are recorded and wait for PUBREL.
CREATE TABLE rx_open (
    owner           INTEGER NOT NULL,           -- of which session
    pkid            INTEGER NOT NULL CHECK (pkid BETWEEN 1 AND 65535),
    hash            BLOB NOT NULL,
    PRIMARY KEY (owner, pkid)
) WITHOUT ROWID;

-- What the broker asked of us, recorded before it was acknowledged.
CREATE TABLE command (
    number          INTEGER PRIMARY KEY,
    id              BLOB,                       -- the command's own id, once it has been read
    topic           TEXT NOT NULL,
    payload         BLOB NOT NULL,
    qos             INTEGER NOT NULL,
    retain          INTEGER NOT NULL,
    response_topic  TEXT,
    correlation     BLOB,
    received_ms     INTEGER NOT NULL,
    received_mono   INTEGER NOT NULL,
    kernel_boot     INTEGER NOT NULL,
    state           INTEGER NOT NULL,           -- 0 recorded, 1 begun, 2 answered unbegun, 3 answered
    synchronised    INTEGER NOT NULL DEFAULT 0  -- whether the wall clock was, when it was received
);
CREATE UNIQUE INDEX command_id ON command (id) WHERE id IS NOT NULL;
CREATE INDEX command_state ON command (state);  -- what waits, and the oldest id to forget

-- Messages the broker will never take.
CREATE TABLE dead_letter (
    number          INTEGER PRIMARY KEY,
    lane            INTEGER NOT NULL,
    seq             INTEGER NOT NULL,
    epoch           INTEGER NOT NULL,
    reason          INTEGER NOT NULL,           -- MQTT reason code
    dead_ms         INTEGER NOT NULL,
    topic           TEXT NOT NULL,
    qos             INTEGER NOT NULL,
    retain          INTEGER NOT NULL,
    at_ms           INTEGER NOT NULL,
    payload         BLOB NOT NULL,
    expires_s       INTEGER,                    -- seconds it was worth sending when it died
    correlation     BLOB
);

-- What limits and damage took and no gap record has yet told the cloud.
CREATE TABLE gap (
    lane            INTEGER NOT NULL,
    reason          TEXT NOT NULL,
    first_seq       INTEGER NOT NULL,
    last_seq        INTEGER NOT NULL,
    count           INTEGER NOT NULL,
    PRIMARY KEY (lane, reason)
) WITHOUT ROWID;

-- Everything ever dropped, by lane and reason.
CREATE TABLE dropped (
    lane            INTEGER NOT NULL,
    reason          TEXT NOT NULL,
    count           INTEGER NOT NULL,
    PRIMARY KEY (lane, reason)
) WITHOUT ROWID;
