//! Topic Names and Topic Filters (3.1.1 and 5.0 clause 4.7).
//!
//! Invariant: `matches` is only true for a valid name under a valid filter as the clauses define them.

/// Whether this may be the Topic Name of a PUBLISH or Will.
pub fn valid_name(name: &str) -> bool {
    !name.is_empty() && !name.contains(['+', '#', '\0'])
}

/// Whether this may be the Topic Filter of a SUBSCRIBE (MQTT-4.7.1-1, MQTT-4.7.1-2, MQTT-4.7.3-1).
pub fn valid_filter(filter: &str) -> bool {
    if filter.is_empty() || filter.contains('\0') {
        return false;
    }
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let lone = level == "+" || (level == "#" && levels.peek().is_none());
        if level.contains(['+', '#']) && !lone {
            return false;
        }
    }
    true
}

/// Whether a message of this name belongs to this filter. A wildcard at the start does not match a name that
/// starts with `$` (MQTT-4.7.2-1); `a/#` matches `a` too (clause 4.7.1.2).
pub fn matches(filter: &str, name: &str) -> bool {
    if name.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut names = name.split('/');
    for level in filter.split('/') {
        if level == "#" {
            return true;
        }
        match names.next() {
            Some(part) if level == "+" || level == part => {}
            _ => return false,
        }
    }
    names.next().is_none()
}
