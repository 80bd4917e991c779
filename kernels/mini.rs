//! Unpacks the miniature pack's weights and lists its files.

use std::{
    env,
    error::Error,
    fmt::Write as _,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use flate2::read::GzDecoder;

/// What lies beside the pack's own files and is not part of it.
const NOT_PACKED: &[&str] = &["README.md", "recipe", "samples", "world.json"];
/// Weight files lie packed in the repository, `x.safetensors.gz`.
const PACKED: &str = "gz";

/// Writes `mini_files.rs`, the list of the pack's files, and the unpacked weights that it names.
pub(crate) fn list(out: &Path) -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("models/mini");
    let mut code = String::from("&[\n");
    let found = files(&root)?;
    for file in &found {
        let name = file.strip_prefix(&root)?;
        let top = name.components().next().map(|part| part.as_os_str().to_string_lossy());
        if top.is_some_and(|top| NOT_PACKED.contains(&top.as_ref())) {
            continue;
        }
        let (name, bytes) = if file.extension().is_some_and(|kind| kind == PACKED) {
            (name.with_extension(""), unpacked(file, &out.join("mini").join(name))?)
        } else if found.contains(&file.with_added_extension(PACKED)) {
            continue; // unpacked by hand: the packed file is what counts
        } else {
            (name.to_owned(), file.clone())
        };
        let path = name.to_string_lossy().replace('\\', "/");
        writeln!(code, "  EmbeddedFile {{ path: {path:?}, bytes: include_bytes!({bytes:?}) }},")?;
    }
    code.push_str("]\n");
    fs::write(out.join("mini_files.rs"), code)?;
    Ok(())
}

/// Unpacks `file` beside `to`, without the ending that says that it is packed.
fn unpacked(file: &Path, to: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let plain = to.with_extension("");
    fs::create_dir_all(plain.parent().ok_or("a file lies in a folder")?)?;
    let mut reader = GzDecoder::new(File::open(file)?);
    io::copy(&mut reader, &mut File::create(&plain)?)
        .map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(plain)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
