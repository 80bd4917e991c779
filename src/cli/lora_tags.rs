//! `<lora:NAME:SCALE>` in a prompt, as other programs' users write it.

use std::path::{Component, Path, PathBuf};

use pentimento::{LoraSource, RequestError, Result};

const START: &str = "<lora:";
const END: char = '>';
/// Added to a name that has no file of its own.
const ENDING: &str = "safetensors";
const FORM: &str = "<lora:NAME> or <lora:NAME:SCALE> with a finite number";

/// A tag of a prompt.
#[derive(Debug, PartialEq)]
pub(crate) struct Tag<'a> {
    name: &'a str,
    strength: f64,
}

/// The prompt without its tags, and the tags.
///
/// # Errors
/// A tag that is not closed or has no such form.
pub(crate) fn split(prompt: &str) -> Result<(String, Vec<Tag<'_>>)> {
    let (mut kept, mut tags) = (String::new(), Vec::new());
    let mut rest = prompt;
    while let Some((before, after)) = rest.split_once(START) {
        let Some((tag, after)) = after.split_once(END) else {
            return Err(fault("prompt", &format!("{START}{after}"), FORM));
        };
        kept.push_str(before);
        tags.push(parse(tag)?);
        rest = after;
    }
    if tags.is_empty() {
        return Ok((prompt.to_owned(), tags));
    }
    kept.push_str(rest);
    let words: Vec<&str> = kept.split(' ').filter(|word| !word.is_empty()).collect();
    Ok((words.join(" "), tags))
}

fn parse(tag: &str) -> Result<Tag<'_>> {
    let (name, strength) = match tag.rsplit_once(':') {
        Some((name, scale)) => (name, scale.parse().ok()),
        None => (tag, Some(1.0)),
    };
    match strength.filter(|scale: &f64| scale.is_finite() && !name.is_empty()) {
        Some(strength) => Ok(Tag { name, strength }),
        None => Err(fault("prompt", &format!("{START}{tag}{END}"), FORM)),
    }
}

/// The files in `folder` that tags name.
///
/// # Errors
/// Tags without a folder, a name that leads out of it, or one without a file.
pub(crate) fn files(tags: &[Tag<'_>], folder: Option<&Path>) -> Result<Vec<LoraSource>> {
    let file = |Tag { name, strength }: &Tag<'_>| {
        let whole = format!("{START}{name}{END}");
        let Some(folder) = folder else {
            return Err(fault("--lora-model-dir", "nothing", &format!("the folder of {whole}")));
        };
        // A prompt may come from elsewhere: it names files of the folder only.
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(fault("prompt", &whole, "the name of a file in --lora-model-dir"));
        }
        let as_named = folder.join(name);
        let path = if as_named.is_file() { as_named } else { with_ending(&folder.join(name)) };
        if !path.is_file() {
            return Err(fault("prompt", &whole, &format!("{} to be a file", path.display())));
        }
        Ok(LoraSource { path, strength: *strength })
    };
    tags.iter().map(file).collect()
}

/// A dot in a name, as in `V1.0`, begins no ending.
fn with_ending(path: &Path) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(".");
    path.push(ENDING);
    path.into()
}

fn fault(field: &'static str, found: &str, expected: &str) -> pentimento::Error {
    RequestError::Field { field, found: found.to_owned(), expected: expected.to_owned() }.into()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn take(prompt: &str, folder: Option<&Path>) -> Result<(String, Vec<LoraSource>)> {
        let (prompt, tags) = split(prompt)?;
        Ok((prompt, files(&tags, folder)?))
    }

    #[test]
    fn tags_name_files_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["ink-V1.0.safetensors", "snow.safetensors"] {
            fs_err::write(folder.path().join(name), "").unwrap();
        }
        let found = |prompt: &str| {
            let (prompt, sources) = take(prompt, Some(folder.path())).unwrap();
            let named = sources.into_iter().map(|source| {
                (source.path.file_name().unwrap().to_str().unwrap().to_owned(), source.strength)
            });
            (prompt, named.collect::<Vec<_>>())
        };
        let file = |name: &str, strength| (format!("{name}.safetensors"), strength);
        assert_eq!(found("a  < b > c"), ("a  < b > c".to_owned(), vec![]));
        assert_eq!(
            found("<lora:ink-V1.0> make it night <lora:snow.safetensors:-0.5>"),
            ("make it night".to_owned(), vec![file("ink-V1.0", 1.0), file("snow", -0.5)])
        );
        assert_eq!(found("x<lora:snow:2>y"), ("xy".to_owned(), vec![file("snow", 2.0)]));
    }

    #[test]
    fn other_tags_are_faults() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join("snow.safetensors"), "").unwrap();
        let inner = folder.path().join("inner");
        fs_err::create_dir(&inner).unwrap();
        for (prompt, word) in [
            ("<lora:snow", "NAME:SCALE"),
            ("<lora:>", "NAME:SCALE"),
            ("<lora:snow:x>", "NAME:SCALE"),
            ("<lora:snow:nan>", "NAME:SCALE"),
            ("<lora::1>", "NAME:SCALE"),
            ("<lora:none>", "none.safetensors to be a file"),
            ("<lora:../snow>", "--lora-model-dir"),
            ("<lora:/etc/passwd>", "--lora-model-dir"),
        ] {
            let error = take(prompt, Some(&inner)).unwrap_err().to_string();
            assert!(error.contains(word), "{prompt}: {error}");
            assert!(error.contains("lora"), "{prompt}: {error}");
        }
        let error = take("<lora:snow>", None).unwrap_err().to_string();
        assert!(error.contains("--lora-model-dir"), "{error}");
    }
}
