//! Which group of points is due when, and when a failing unit is tried again. Pure.
