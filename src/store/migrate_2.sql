-- Schema 1 to 2. What it makes and what schema.sql makes are the same tables.

ALTER TABLE dead_letter ADD COLUMN expires_s INTEGER;
ALTER TABLE dead_letter ADD COLUMN correlation BLOB;

CREATE INDEX command_state ON command (state);
