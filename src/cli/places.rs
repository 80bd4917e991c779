//! Where models are looked for, and what a name stands for.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use pentimento::{
    RequestError, Result,
    library::{self, Places, Want},
    weights::Family,
};

use super::weights_args::PlacesArgs;

/// Folders with models, separated as in PATH.
const FOLDERS: &str = "PENTIMENTO_MODELS_DIR";

/// The places that flags and the environment name.
///
/// # Errors
/// A flag with a folder that is not there: it would be a place with no models, and nobody told.
pub(crate) fn places(args: &PlacesArgs) -> Result<Places> {
    if let Some(absent) = args.models_dir.iter().find(|folder| !folder.is_dir()) {
        return Err(RequestError::Field {
            field: "--models-dir",
            found: absent.display().to_string(),
            expected: "a folder that is there".to_owned(),
        }
        .into());
    }
    Ok(places_from(&args.models_dir, |name| std::env::var_os(name), std::env::home_dir()))
}

fn places_from(
    named: &[PathBuf],
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<PathBuf>,
) -> Places {
    let path = |name: &str| variable(name).filter(|it| !it.is_empty()).map(PathBuf::from);
    let mut folders = named.to_vec();
    folders.extend(variable(FOLDERS).iter().flat_map(std::env::split_paths));
    let cache = || path("XDG_CACHE_HOME").or_else(|| Some(home.as_ref()?.join(".cache")));
    let hub = path("HF_HUB_CACHE")
        .or_else(|| Some(path("HF_HOME")?.join("hub")))
        .or_else(|| Some(cache()?.join("huggingface/hub")));
    let comfy = home.as_ref().map(|home| home.join("ComfyUI"));
    let there = |it: Option<PathBuf>| it.filter(|it| it.is_dir()).into_iter().collect();
    Places { folders, hubs: there(hub), comfy: there(comfy) }
}

/// What a flag's value stands for.
pub(crate) fn model_folder(
    flag: &'static str,
    value: &Option<PathBuf>,
    places: &Places,
) -> Result<Option<PathBuf>> {
    value.as_deref().map(|value| library::resolve(flag, value, Want::Folder, places)).transpose()
}

/// What the value of `--planner` stands for.
pub(crate) fn planner_folder(value: &Option<PathBuf>, places: &Places) -> Result<Option<PathBuf>> {
    let resolve = |value: &Path| library::resolve("--planner", value, Want::ModelOrPart, places);
    value.as_deref().map(resolve).transpose()
}

/// What a flag's value stands for: a weight file of one of these families.
pub(crate) fn weight_file(
    flag: &'static str,
    value: &Option<PathBuf>,
    families: &[Family],
    places: &Places,
) -> Result<Option<PathBuf>> {
    let resolve = |value: &Path| library::resolve(flag, value, Want::File(families), places);
    value.as_deref().map(resolve).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_environment_name_places() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        for path in ["hf/hub", "cache", "home/.cache/huggingface/hub", "home/ComfyUI"] {
            std::fs::create_dir_all(at(path)).unwrap();
        }
        let with = |variables: &[(&str, PathBuf)]| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| value.clone().into_os_string())
            };
            places_from(&[at("named")], variable, Some(at("home")))
        };
        let usual = with(&[]);
        assert_eq!(usual.folders, [at("named")]);
        assert_eq!(usual.hubs, [at("home/.cache/huggingface/hub")]);
        assert_eq!(usual.comfy, [at("home/ComfyUI")]);
        assert_eq!(with(&[("HF_HOME", at("hf"))]).hubs, [at("hf/hub")]);
        let both = with(&[("HF_HOME", at("hf")), ("HF_HUB_CACHE", at("cache"))]);
        assert_eq!(both.hubs, [at("cache")]);
        let two = std::env::join_paths([at("one"), at("two")]).unwrap();
        let listed = with(&[(FOLDERS, two.into())]).folders;
        assert_eq!(listed, [at("named"), at("one"), at("two")]);
    }
}
