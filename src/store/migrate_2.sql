-- Schema 1 to 2. What it makes and what schema.sql makes are the same tables.

ALTER TABLE dead_letter ADD COLUMN expires_s INTEGER;
ALTER TABLE dead_letter ADD COLUMN correlation BLOB;

ALTER TABLE command ADD COLUMN synchronised INTEGER NOT NULL DEFAULT 0;
CREATE INDEX command_state ON command (state);
ALTER TABLE inflight ADD COLUMN retain INTEGER;
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
