//! Topic templates: `{gateway}/{line}/{unit}/{point}` to topics that can always be published. Pure.
//!
//! Invariant: a rendered topic has exactly the levels of its template, whatever the names are, and passes
//! [`Topic::new`]: no `+`, `#`, NUL or control character, no leading `$` (MQTT 5.0 section 4.7).

use crate::message::{Topic, TopicError};

/// The names that stand in for the placeholders of one topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names<'a> {
    /// For `{gateway}`.
    pub gateway: &'a str,
    /// For `{line}`; empty where there is no line, and then a template that asks for it is refused.
    pub line: &'a str,
    /// For `{unit}`; empty where there is no unit.
    pub unit: &'a str,
    /// For `{point}`; empty where there is no point.
    pub point: &'a str,
}

/// What stands between braces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placeholder {
    /// `{gateway}`
    Gateway,
    /// `{line}`
    Line,
    /// `{unit}`
    Unit,
    /// `{point}`
    Point,
}

impl Placeholder {
    /// Every placeholder.
    pub const ALL: [Placeholder; 4] =
        [Placeholder::Gateway, Placeholder::Line, Placeholder::Unit, Placeholder::Point];

    /// The word between the braces.
    pub fn name(self) -> &'static str {
        match self {
            Placeholder::Gateway => "gateway",
            Placeholder::Line => "line",
            Placeholder::Unit => "unit",
            Placeholder::Point => "point",
        }
    }

    fn pick<'a>(self, names: &Names<'a>) -> &'a str {
        match self {
            Placeholder::Gateway => names.gateway,
            Placeholder::Line => names.line,
            Placeholder::Unit => names.unit,
            Placeholder::Point => names.point,
        }
    }
}

/// Why a template, or a topic made from one, cannot be used. Positions count characters of the template from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// `{` without `}`.
    #[error("the '{{' at character {at} is never closed; write {{gateway}}, {{line}}, {{unit}} or {{point}}")]
    Unclosed {
        /// Where the brace is.
        at: usize,
    },
    /// `}` without `{`.
    #[error("the '}}' at character {at} closes nothing")]
    Unopened {
        /// Where the brace is.
        at: usize,
    },
    /// Not one of the four placeholders.
    #[error(
        "unknown placeholder {{{name}}} at character {at}; there are {{gateway}}, {{line}}, {{unit}} and {{point}}"
    )]
    Unknown {
        /// Where its `{` is.
        at: usize,
        /// What stands between the braces.
        name: String,
    },
    /// A character that no topic may hold.
    #[error("{character:?} at character {at} must not stand in a topic to publish to")]
    Character {
        /// Where it is.
        at: usize,
        /// The character.
        character: char,
    },
    /// A name that would change the levels of the topic or make it a filter.
    #[error("the {placeholder} name {name:?} cannot stand in a topic: it holds {character:?}")]
    Name {
        /// `gateway`, `line`, `unit` or `point`.
        placeholder: &'static str,
        /// The name.
        name: String,
        /// What it must not hold.
        character: char,
    },
    /// There is no name to put there.
    #[error("{{{placeholder}}} cannot be used here: there is no {placeholder} name")]
    NoName {
        /// `gateway`, `line`, `unit` or `point`.
        placeholder: &'static str,
    },
    /// Empty, too long, or a leading `$`.
    #[error(transparent)]
    Topic(#[from] TopicError),
}

impl TemplateError {
    /// Where in the template the trouble is, in characters from 1, if it is at one place.
    pub fn at(&self) -> Option<usize> {
        match self {
            TemplateError::Unclosed { at }
            | TemplateError::Unopened { at }
            | TemplateError::Unknown { at, .. }
            | TemplateError::Character { at, .. } => Some(*at),
            TemplateError::Name { .. } | TemplateError::NoName { .. } | TemplateError::Topic(_) => None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Name(Placeholder),
}

/// A checked topic template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

impl Template {
    /// Checks a template.
    ///
    /// # Errors
    /// The first thing in it that could never become part of a topic, with its position.
    pub fn parse(text: &str) -> Result<Template, TemplateError> {
        if text.is_empty() {
            return Err(TopicError::Empty.into());
        }
        if text.starts_with('$') {
            return Err(TopicError::Dollar.into());
        }
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut characters = text.chars().enumerate();
        while let Some((index, character)) = characters.next() {
            let at = index + 1;
            match character {
                '{' => {
                    let name: Option<String> = read_placeholder(&mut characters);
                    let name = name.ok_or(TemplateError::Unclosed { at })?;
                    if !literal.is_empty() {
                        pieces.push(Piece::Text(std::mem::take(&mut literal)));
                    }
                    match Placeholder::ALL.into_iter().find(|placeholder| placeholder.name() == name) {
                        Some(placeholder) => pieces.push(Piece::Name(placeholder)),
                        None => return Err(TemplateError::Unknown { at, name }),
                    }
                }
                '}' => return Err(TemplateError::Unopened { at }),
                c if not_in_a_topic(c) => return Err(TemplateError::Character { at, character: c }),
                c => literal.push(c),
            }
        }
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal));
        }
        Ok(Template { pieces })
    }

    /// Whether a placeholder stands in the template.
    pub fn uses(&self, placeholder: Placeholder) -> bool {
        self.pieces.contains(&Piece::Name(placeholder))
    }

    /// Puts the names in.
    ///
    /// # Errors
    /// A name that is empty or holds `/`, `+`, `#` or a control character; a topic that would start with `$`
    /// or be longer than 65,535 bytes. Names the template does not use are not looked at.
    pub fn render(&self, names: &Names<'_>) -> Result<Topic, TemplateError> {
        let mut topic = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => topic.push_str(text),
                Piece::Name(placeholder) => topic.push_str(checked_name(*placeholder, names)?),
            }
        }
        Ok(Topic::new(&topic)?)
    }
}

/// The text up to the closing brace, which is consumed; `None` when there is none before the next `{`.
fn read_placeholder(characters: &mut impl Iterator<Item = (usize, char)>) -> Option<String> {
    let mut name = String::new();
    for (_, character) in characters {
        match character {
            '}' => return Some(name),
            '{' => return None,
            c => name.push(c),
        }
    }
    None
}

fn checked_name<'a>(placeholder: Placeholder, names: &Names<'a>) -> Result<&'a str, TemplateError> {
    let name = placeholder.pick(names);
    if name.is_empty() {
        return Err(TemplateError::NoName { placeholder: placeholder.name() });
    }
    match name.chars().find(|c| *c == '/' || not_in_a_topic(*c)) {
        Some(character) => {
            Err(TemplateError::Name { placeholder: placeholder.name(), name: name.to_owned(), character })
        }
        None => Ok(name),
    }
}

fn not_in_a_topic(character: char) -> bool {
    matches!(character, '+' | '#') || character.is_control()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: Names<'_> =
        Names { gateway: "press-shop-1", line: "line1", unit: "meter1", point: "voltage" };

    #[test]
    fn templates_become_topics() {
        for (template, topic) in [
            ("{gateway}/{line}/{unit}/{point}", "press-shop-1/line1/meter1/voltage"),
            ("plant/{unit}", "plant/meter1"),
            ("{unit}-{point}", "meter1-voltage"),
            ("fixed", "fixed"),
            ("a//{line}/", "a//line1/"),
            ("{line}{line}", "line1line1"),
            ("größe/{point}", "größe/voltage"),
            ("a$b/{point}", "a$b/voltage"),
        ] {
            let rendered = Template::parse(template).expect(template).render(&NAMES).expect(template);
            assert_eq!(rendered.as_str(), topic);
        }
    }

    #[test]
    fn a_broken_template_is_refused_with_its_place() {
        let unknown = |at, name: &str| TemplateError::Unknown { at, name: name.into() };
        for (template, error) in [
            ("", TemplateError::Topic(TopicError::Empty)),
            ("$SYS/{line}", TemplateError::Topic(TopicError::Dollar)),
            ("a/{line", TemplateError::Unclosed { at: 3 }),
            ("é/{line/{unit}", TemplateError::Unclosed { at: 3 }),
            ("a/line}", TemplateError::Unopened { at: 7 }),
            ("a/{}", unknown(3, "")),
            ("a/{device}", unknown(3, "device")),
            ("a/{Line}", unknown(3, "Line")),
            ("a/{ line }", unknown(3, " line ")),
            ("a/+/b", TemplateError::Character { at: 3, character: '+' }),
            ("a/#", TemplateError::Character { at: 3, character: '#' }),
            ("a\0", TemplateError::Character { at: 2, character: '\0' }),
            ("a/\u{85}", TemplateError::Character { at: 3, character: '\u{85}' }),
        ] {
            assert_eq!(Template::parse(template), Err(error), "{template:?}");
        }
    }

    #[test]
    fn a_name_that_would_change_the_topic_is_refused() {
        let template = Template::parse("{gateway}/{unit}").expect("a template");
        for (unit, error) in [
            ("a/b", TemplateError::Name { placeholder: "unit", name: "a/b".into(), character: '/' }),
            ("a+", TemplateError::Name { placeholder: "unit", name: "a+".into(), character: '+' }),
            ("#", TemplateError::Name { placeholder: "unit", name: "#".into(), character: '#' }),
            ("a\nb", TemplateError::Name { placeholder: "unit", name: "a\nb".into(), character: '\n' }),
            ("", TemplateError::NoName { placeholder: "unit" }),
        ] {
            assert_eq!(template.render(&Names { unit, ..NAMES }), Err(error), "{unit:?}");
        }
        let dollar = template.render(&Names { gateway: "$share", ..NAMES });
        assert_eq!(dollar, Err(TemplateError::Topic(TopicError::Dollar)));
        let long = "x".repeat(65_536);
        let long = template.render(&Names { unit: &long, ..NAMES });
        assert!(matches!(long, Err(TemplateError::Topic(TopicError::TooLong(_)))), "{long:?}");
        assert!(template.render(&Names { point: "not/used", ..NAMES }).is_ok());
    }

    #[test]
    fn errors_name_the_remedy() {
        let text = |template: &str| Template::parse(template).expect_err(template).to_string();
        assert_eq!(
            text("a/{device}"),
            "unknown placeholder {device} at character 3; there are {gateway}, {line}, {unit} and {point}"
        );
        assert_eq!(text("a}"), "the '}' at character 2 closes nothing");
        assert_eq!(
            text("{a"),
            "the '{' at character 1 is never closed; write {gateway}, {line}, {unit} or {point}"
        );
    }

    proptest! {
        #[test]
        fn names_never_add_a_level_nor_make_a_filter(
            levels in proptest::collection::vec("[a-z{]{0,3}(\\{(gateway|line|unit|point)\\})?", 1..6),
            gateway in ".{0,6}", line in "[a-z/+#$]{0,4}", unit in any::<String>(), point in "[a-zäöü ]{1,6}",
        ) {
            let text = levels.join("/");
            let names = Names { gateway: &gateway, line: &line, unit: &unit, point: &point };
            if let Ok(template) = Template::parse(&text)
                && let Ok(topic) = template.render(&names)
            {
                prop_assert_eq!(topic.as_str().split('/').count(), levels.len());
                prop_assert!(Topic::new(topic.as_str()).is_ok());
                prop_assert!(!topic.as_str().starts_with('$'));
                prop_assert!(!topic.as_str().contains(['+', '#', '\0']));
            }
        }

        #[test]
        fn no_template_panics(text in any::<String>(), name in any::<String>()) {
            if let Ok(template) = Template::parse(&text) {
                let names = Names { gateway: &name, line: &name, unit: &name, point: &name };
                let _ = template.render(&names);
            }
        }
    }
}
