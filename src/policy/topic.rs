//! Topic templates: `{gateway}/{line}/{unit}/{point}` to topics that can always be published. Pure.
