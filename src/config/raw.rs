//! The file's own shape: keys as they are spelt, values as they were written, each with its place.
