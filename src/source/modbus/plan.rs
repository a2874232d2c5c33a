//! Points to the fewest legal read requests. Pure.
