-- Schema 1 to 2. What it makes and what schema.sql makes are the same tables.

ALTER TABLE dead_letter ADD COLUMN expires_s INTEGER;
ALTER TABLE dead_letter ADD COLUMN correlation BLOB;

ALTER TABLE command ADD COLUMN synchronised INTEGER NOT NULL DEFAULT 0;
CREATE INDEX command_state ON command (state);
CREATE TABLE retained_ahead (
    lane            INTEGER NOT NULL,
    topic           TEXT NOT NULL,
    seq             INTEGER NOT NULL,
    PRIMARY KEY (lane, topic)
) WITHOUT ROWID;
CREATE TABLE budget (
    one             INTEGER PRIMARY KEY CHECK (one = 1),
    per             TEXT NOT NULL,              -- day or month
    period          INTEGER,                    -- which one since the year 0 or 1970; NULL: by running time
    used            INTEGER NOT NULL,           -- bytes
    ran_ms          INTEGER NOT NULL            -- running time in it
);
ALTER TABLE segment ADD COLUMN synchronised INTEGER NOT NULL DEFAULT 0;

-- Rows belong to one of several sessions; until now there was one.
CREATE TEMP TABLE inflight_1 AS SELECT * FROM inflight;
CREATE TEMP TABLE session_1 AS SELECT * FROM session;
CREATE TEMP TABLE rx_open_1 AS SELECT * FROM rx_open;
DROP TABLE inflight;
DROP TABLE session;
DROP TABLE rx_open;
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
CREATE TABLE session (
    owner           INTEGER PRIMARY KEY,
    broker          TEXT NOT NULL,
    client_id       TEXT NOT NULL,
    uncertain       INTEGER NOT NULL,           -- an "absent" may have been missed
    clean_start     INTEGER NOT NULL,           -- the broker's session must be discarded first
    canary          INTEGER NOT NULL            -- the canary's echo has been seen
);
CREATE TABLE rx_open (
    owner           INTEGER NOT NULL,           -- of which session
    pkid            INTEGER NOT NULL CHECK (pkid BETWEEN 1 AND 65535),
    hash            BLOB NOT NULL,
    PRIMARY KEY (owner, pkid)
) WITHOUT ROWID;
INSERT INTO inflight SELECT 1, pkid, lane, seq, send_no, state, NULL FROM inflight_1;
INSERT INTO session SELECT 1, broker, client_id, uncertain, clean_start, canary FROM session_1;
INSERT INTO rx_open SELECT 1, pkid, hash FROM rx_open_1;
DROP TABLE inflight_1;
DROP TABLE session_1;
DROP TABLE rx_open_1;
