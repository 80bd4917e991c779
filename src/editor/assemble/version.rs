//! Which version of the editor a transformer is: their tensors have equal shapes.

use serde_json::{Map, Value as Json};

use crate::{
    diffusion::qwen_image::header::Header,
    editor::{
        pipeline::{Kind, Pipeline},
        source::ModelParts,
    },
    error::{ModelError, Result},
    weights::ModelFiles,
};

/// A version of the editor.
#[derive(Debug)]
pub(in crate::editor) struct Version {
    pub(in crate::editor) kind: Kind,
    /// References are modulated as free of noise (the 2511 version).
    pub(in crate::editor) zero_cond_t: bool,
    /// Why it is taken for that.
    pub(in crate::editor) reason: String,
    /// What the user should know about the choice.
    pub(in crate::editor) note: Option<String>,
}

impl Version {
    /// By the flag, the config beside the file, the tensor that marks 2511, the names in the
    /// metadata, the file's name, the folder's pipeline; in this order.
    ///
    /// `origin` is where the config comes from, for messages.
    ///
    /// # Errors
    /// A folder whose pipeline is not supported, or a config with something else than true or false
    /// in `zero_cond_t`.
    pub(in crate::editor) fn find(
        parts: &ModelParts,
        header: &Header,
        config: &Map<String, Json>,
        origin: &str,
        stem: &str,
    ) -> Result<Self> {
        let plus = |zero_cond_t, reason: &str| Self {
            kind: Kind::Plus,
            zero_cond_t,
            reason: reason.to_owned(),
            note: None,
        };
        let named = || {
            let names = header.names().into_iter().map(|name| ("its metadata name it", name));
            names.chain([("it is called", stem)]).find_map(|(how, name)| {
                let (kind, zero_cond_t) = by_name(name)?;
                Some(Self { kind, zero_cond_t, reason: format!("{how} {name}"), note: None })
            })
        };
        let said = zero_cond_t(config, origin)?;
        let found = if said == Some(true) {
            Some(plus(true, "its config has zero_cond_t"))
        } else if said == Some(false) {
            // The config rules over marks and names; which pictures the model sees, names may tell.
            let kind = named().map(|found| found.kind);
            let unnamed = || Self::folder_kind(parts);
            let kind = kind.map_or_else(unnamed, Ok)?;
            let reason = "its config says that zero_cond_t is false".to_owned();
            Some(Self { kind, zero_cond_t: false, reason, note: None })
        } else if header.is_marked() {
            Some(plus(true, "it has the tensor __index_timestep_zero__"))
        } else {
            named()
        };
        match (parts.zero_cond_t, found) {
            (Some(true), _) => Ok(plus(true, "--model-args says so")),
            (Some(false), Some(found)) => Ok(Self { zero_cond_t: false, ..found }),
            (Some(false), None) => Self::unnamed(parts),
            (None, Some(found)) => Ok(found),
            (None, None) => Self::unnamed(parts),
        }
    }

    /// The pipeline of the folder that lends the rest, or the newest.
    fn folder_kind(parts: &ModelParts) -> Result<Kind> {
        lender(parts).map_or(Ok(Kind::Plus), |files| Ok(Pipeline::read(&files)?.kind))
    }

    /// A file whose name and contents do not tell: the folder's version, where there is one.
    fn unnamed(parts: &ModelParts) -> Result<Self> {
        let (files, kind) = (lender(parts), Self::folder_kind(parts)?);
        let zero_cond_t =
            parts.zero_cond_t.is_none() && files.as_ref().is_some_and(folders_zero_cond_t);
        let version = version_name(kind, zero_cond_t);
        let (taken, reason) = match files {
            Some(_) => ("as --model's is", "nothing tells but the folder beside it"),
            None => ("which is a guess", "nothing tells; it is a guess"),
        };
        let note = parts.zero_cond_t.is_none().then(|| {
            format!(
                "neither the diffusion model's file nor its name says which version it is; it is taken \
                 for {version}, {taken}; --model-args qwen_image_zero_cond_t=true means the 2511 \
                 version, =false the others"
            )
        });
        Ok(Self { kind, zero_cond_t, reason: reason.to_owned(), note })
    }
}

/// The folder that lends the rest, where it holds a whole pipeline.
pub(in crate::editor) fn lender(parts: &ModelParts) -> Option<ModelFiles> {
    let folder = parts.folder.clone().filter(|it| it.join("model_index.json").is_file());
    folder.map(ModelFiles::Folder)
}

/// Whether the transformer of a folder is of the 2511 version.
fn folders_zero_cond_t(files: &ModelFiles) -> bool {
    let config: Result<Map<String, Json>> = files.read_json("transformer/config.json");
    config.is_ok_and(|config| config.get("zero_cond_t") == Some(&Json::Bool(true)))
}

/// What the config says, if it says anything.
fn zero_cond_t(config: &Map<String, Json>, origin: &str) -> Result<Option<bool>> {
    match config.get("zero_cond_t") {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Bool(on)) => Ok(Some(*on)),
        Some(other) => Err(ModelError::Config {
            path: origin.to_owned(),
            field: "zero_cond_t".to_owned(),
            found: other.to_string(),
            expected: "true or false".to_owned(),
        }
        .into()),
    }
}

/// What the published version is called.
pub(in crate::editor) fn version_name(kind: Kind, zero_cond_t: bool) -> &'static str {
    match (kind, zero_cond_t) {
        (Kind::Edit, _) => "Qwen-Image-Edit",
        (Kind::Plus, false) => "Qwen-Image-Edit-2509",
        (Kind::Plus, true) => "Qwen-Image-Edit-2511",
    }
}

/// The version that a name tells.
pub(in crate::editor) fn by_name(name: &str) -> Option<(Kind, bool)> {
    let name = name.to_lowercase();
    [("2511", Kind::Plus, true), ("2509", Kind::Plus, false), ("edit", Kind::Edit, false)]
        .into_iter()
        .find_map(|(sign, kind, zero_cond_t)| name.contains(sign).then_some((kind, zero_cond_t)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_versions() {
        for (name, version) in [
            ("qwen-image-edit-2511-Q4_K_M", Some((Kind::Plus, true))),
            ("Qwen-Image-Edit-2509-Q8_0", Some((Kind::Plus, false))),
            ("Qwen_Image_Edit-Q5_K_S", Some((Kind::Edit, false))),
            ("model", None),
        ] {
            assert_eq!(by_name(name), version, "{name}");
        }
    }
}
