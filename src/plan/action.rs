//! The verbs of edit requests.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use super::text::normalized;

/// What is done to a subject: the 15 verbs into which PSR (arXiv 2505.16181) sorts 305,806 edits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Something new appears.
    Add,
    /// Tone, contrast, saturation.
    Adjust,
    /// A filter or a style.
    Apply,
    /// A copy of something that is there.
    Clone,
    /// The picture is cut.
    Crop,
    /// Something goes away.
    Delete,
    /// Pictures are put together.
    Merge,
    /// Something goes to another place.
    Move,
    /// Another color.
    Recolor,
    /// Another light.
    Relight,
    /// One thing in the place of another.
    Replace,
    /// What no other verb covers.
    Specialized,
    /// More pixels.
    SuperResolution,
    /// Flip, scale, rotate, skew.
    Transform,
    /// Nearer or farther.
    Zoom,
}

impl Action {
    /// All verbs, in the order of their labels.
    pub const ALL: [Self; 15] = [
        Self::Add,
        Self::Adjust,
        Self::Apply,
        Self::Clone,
        Self::Crop,
        Self::Delete,
        Self::Merge,
        Self::Move,
        Self::Recolor,
        Self::Relight,
        Self::Replace,
        Self::Specialized,
        Self::SuperResolution,
        Self::Transform,
        Self::Zoom,
    ];

    /// The label in replies, plans and annotations.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Adjust => "adjust",
            Self::Apply => "apply",
            Self::Clone => "clone",
            Self::Crop => "crop",
            Self::Delete => "delete",
            Self::Merge => "merge",
            Self::Move => "move",
            Self::Recolor => "recolor",
            Self::Relight => "relight",
            Self::Replace => "replace",
            Self::Specialized => "specialized",
            Self::SuperResolution => "super-resolution",
            Self::Transform => "transform",
            Self::Zoom => "zoom",
        }
    }

    /// The verb of this label; PSR's own spelling `re-color` counts, too.
    #[must_use]
    pub fn named(label: &str) -> Option<Self> {
        let plain = |text: &str| normalized(text).replace(['-', ' '], "");
        let wanted = plain(label);
        Self::ALL.into_iter().find(|action| plain(action.label()) == wanted)
    }

    /// Goals that say no more than the verb: a sub-request need not repeat them.
    pub(super) fn implied_goals(self) -> &'static [&'static str] {
        match self {
            Self::Delete => &["gone", "removed", "deleted", "erased", "absent", "none", "nothing"],
            Self::Clone => &["copied", "copy", "duplicated", "twice"],
            Self::SuperResolution => &["higher resolution", "upscaled", "sharp"],
            _ => &[],
        }
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label())
    }
}

impl Serialize for Action {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.label())
    }
}

impl<'de> Deserialize<'de> for Action {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let label = String::deserialize(deserializer)?;
        Self::named(&label).ok_or_else(|| {
            let labels = Self::ALL.map(Self::label).join(", ");
            D::Error::custom(format!("{label:?} is no action, expected one of: {labels}"))
        })
    }
}

#[cfg(test)]
impl schemars::JsonSchema for Action {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Action".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "enum": Self::ALL.map(Self::label) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_name_their_verbs_in_either_spelling() {
        for action in Action::ALL {
            assert_eq!(Action::named(action.label()), Some(action));
            assert_eq!(Action::named(&action.label().to_uppercase()), Some(action));
        }
        assert_eq!(Action::named("re-color"), Some(Action::Recolor));
        assert_eq!(Action::named("super resolution"), Some(Action::SuperResolution));
        assert_eq!(Action::named("paint"), None);
    }
}
