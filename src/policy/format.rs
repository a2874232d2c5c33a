//! What payloads say: the wire contract. Pure.
