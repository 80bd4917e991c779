//! Files appear whole or not at all: a sibling temporary file, then a rename.

use std::{
    fs::Metadata,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use super::{
    encode::{Format, encode_to_vec},
    metadata::EditRecord,
    picture::Picture,
};
use crate::error::{PictureError, Result};

/// What happens to a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// It stays, and writing is an error.
    #[default]
    Refuse,
    /// It is replaced in one step.
    Replace,
}

/// Checks before any work that `path` can be written, and says in which format.
///
/// # Errors
/// An extension without format, a folder that is missing or not writable, a path that is a folder
/// or a device, a file that exists and may not be replaced.
pub fn check_output(path: &Path, overwrite: Overwrite) -> Result<Format> {
    let format = Format::from_path(path)?;
    let target = target_of(path, overwrite)?;
    // Only an attempt tells whether the folder takes files; the file goes at once.
    drop(temporary_beside(&target).map_err(|error| failed(path, &error))?);
    Ok(format)
}

/// Encodes a picture in the format of the path's extension and writes it; returns notes on what
/// the format does not keep.
///
/// # Errors
/// What [`check_output`], [`encode_to_vec`] and [`write_file`] refuse.
pub fn save(
    picture: &Picture,
    path: &Path,
    overwrite: Overwrite,
    record: Option<&EditRecord>,
) -> Result<Vec<String>> {
    let encoded = encode_to_vec(picture, Format::from_path(path)?, record)?;
    write_file(path, &encoded.bytes, overwrite)?;
    Ok(encoded.notes)
}

/// Writes a file so that it appears whole or not at all, and survives a loss of power.
///
/// With [`Overwrite::Refuse`] a file that appeared in the meantime is not replaced either. A
/// replaced file hands its permissions on; behind a symbolic link the file it points to is replaced.
///
/// # Errors
/// [`PictureError::Exists`]; [`PictureError::Write`] when the system refuses, for example a full
/// disk. Nothing is left behind then.
pub fn write_file(path: &Path, bytes: &[u8], overwrite: Overwrite) -> Result<()> {
    let target = target_of(path, overwrite)?;
    let written = || -> io::Result<NamedTempFile> {
        let mut file = temporary_beside(&target)?;
        file.write_all(bytes)?;
        if let Ok(replaced) = std::fs::metadata(&target) {
            file.as_file().set_permissions(replaced.permissions())?;
        }
        file.as_file().sync_all()?;
        Ok(file)
    };
    let file = written().map_err(|error| failed(path, &error))?;
    put_in_place(file, &target, overwrite).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => PictureError::Exists { path: path.to_owned() }.into(),
        _ => failed(path, &error),
    })
}

fn put_in_place(file: NamedTempFile, target: &Path, overwrite: Overwrite) -> io::Result<()> {
    match overwrite {
        Overwrite::Replace => file.persist(target).map_err(|failure| failure.error)?,
        Overwrite::Refuse => match file.persist_noclobber(target) {
            Ok(file) => file,
            Err(failure) if failure.error.kind() == ErrorKind::AlreadyExists => {
                return Err(failure.error);
            }
            // Some file systems have neither hard links nor a rename that refuses.
            Err(failure) if entry(target)?.is_none() => {
                failure.file.persist(target).map_err(|failure| failure.error)?
            }
            Err(failure) => return Err(failure.error),
        },
    };
    // The rename itself is on disk once its folder is; not every file system can be asked for that.
    if let Ok(folder) = fs_err::File::open(folder_of(target)) {
        drop(folder.sync_all());
    }
    Ok(())
}

/// The path that a file goes to, links followed.
fn target_of(path: &Path, overwrite: Overwrite) -> Result<PathBuf> {
    let refused = |reason: &str, hint: &str| {
        let (reason, hint) = (reason.to_owned(), hint.to_owned());
        Err(PictureError::Write { path: path.to_owned(), reason, hint }.into())
    };
    if path.file_name().is_none() || path.as_os_str().to_string_lossy().ends_with(['/', '\\']) {
        return refused("this is not the name of a file", "add a name such as out.png");
    }
    let folder = folder_of(path);
    match std::fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => {
            let reason = format!("{} is not a folder", folder.display());
            return refused(&reason, "choose another place");
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let reason = format!("the folder {} does not exist", folder.display());
            return refused(&reason, "make the folder first");
        }
        Err(error) => return Err(failed(path, &error)),
    }
    let Some(found) = entry(path).map_err(|error| failed(path, &error))? else {
        return Ok(path.to_owned());
    };
    if found.is_dir() {
        return refused("this is a folder", "add a name such as out.png");
    }
    if overwrite == Overwrite::Refuse {
        return Err(PictureError::Exists { path: path.to_owned() }.into());
    }
    let target = match found.is_symlink() {
        true => std::fs::canonicalize(path).map_err(|error| failed(path, &error))?,
        false => path.to_owned(),
    };
    match std::fs::metadata(&target) {
        Ok(metadata) if metadata.is_file() => Ok(target),
        Ok(_) => refused("this is not a regular file", "choose another name"),
        Err(error) => Err(failed(path, &error)),
    }
}

/// What stands under a name, a link not followed; nothing is no error.
fn entry(path: &Path) -> io::Result<Option<Metadata>> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A new file in the folder of `target`, with the permissions of an ordinary new file.
fn temporary_beside(target: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".pentimento-").suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // less the umask
    }
    builder.tempfile_in(folder_of(target))
}

fn failed(path: &Path, error: &io::Error) -> crate::Error {
    let hint = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free space on the disk, or write to another one"
        }
        ErrorKind::FileTooLarge => "the file would be larger than the system allows (ulimit -f)",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "choose a folder that you may write to"
        }
        _ => "choose another place",
    };
    let (path, reason, hint) = (path.to_owned(), error.to_string(), hint.to_owned());
    PictureError::Write { path, reason, hint }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_says_so() {
        let error = failed(Path::new("out.png"), &io::Error::from(ErrorKind::StorageFull));
        let message = error.to_string();
        assert!(message.starts_with("out.png: cannot write the picture: "), "{message}");
        assert!(message.contains("free space on the disk"), "{message}");
    }
}
