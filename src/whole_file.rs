//! Files appear whole or not at all: a temporary file beside them, then a rename.

use std::{
    fs::Metadata,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

/// What happens to a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// It stays, and writing is an error.
    #[default]
    Refuse,
    /// It is replaced in one step.
    Replace,
}

/// A path in a report for programs: JSON is Unicode, and a path may not be.
pub(crate) fn lossy_path<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&path.to_string_lossy())
}

/// Why a file cannot be written; nothing is left behind.
#[derive(Debug)]
pub(crate) enum Refused {
    /// It exists and may not be replaced.
    Exists,
    /// The system refuses, or the path is not that of a file.
    Failed {
        /// What was found.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
}

/// A file that is being written and has no name yet. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct WholeFile {
    file: NamedTempFile,
    target: PathBuf,
    overwrite: Overwrite,
}

impl WholeFile {
    /// A new file that will get the name `path`, in the same folder.
    ///
    /// # Errors
    /// A folder that is missing or not writable, a path that is a folder or a device, a file that
    /// exists and may not be replaced.
    pub(crate) fn create(path: &Path, overwrite: Overwrite) -> Result<Self, Refused> {
        let target = target_of(path, overwrite)?;
        let file = temporary_beside(&target).map_err(|error| failed(&error))?;
        Ok(Self { file, target, overwrite })
    }

    /// Where it lies until it gets its name.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives the file its name; it survives a loss of power then.
    ///
    /// With [`Overwrite::Refuse`] a file that appeared in the meantime is not replaced either. A
    /// replaced file hands its permissions on; behind a symbolic link the file it points to is
    /// replaced.
    ///
    /// # Errors
    /// [`Refused`], and nothing is left behind then.
    pub(crate) fn put_in_place(self) -> Result<(), Refused> {
        let Self { file, target, overwrite } = self;
        let synced = || -> io::Result<()> {
            if let Ok(replaced) = std::fs::metadata(&target) {
                file.as_file().set_permissions(replaced.permissions())?;
            }
            file.as_file().sync_all()
        };
        synced().map_err(|error| failed(&error))?;
        put_in_place(file, &target, overwrite).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => Refused::Exists,
            _ => failed(&error),
        })
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
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
fn target_of(path: &Path, overwrite: Overwrite) -> Result<PathBuf, Refused> {
    let refused =
        |reason: &str, hint: &'static str| Err(Refused::Failed { reason: reason.to_owned(), hint });
    if path.file_name().is_none() || path.as_os_str().to_string_lossy().ends_with(['/', '\\']) {
        return refused("this is not the name of a file", "add the name of a file");
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
        Err(error) => return Err(failed(&error)),
    }
    let Some(found) = entry(path).map_err(|error| failed(&error))? else {
        return Ok(path.to_owned());
    };
    if found.is_dir() {
        return refused("this is a folder", "add the name of a file");
    }
    if overwrite == Overwrite::Refuse {
        return Err(Refused::Exists);
    }
    let target = match found.is_symlink() {
        true => std::fs::canonicalize(path).map_err(|error| failed(&error))?,
        false => path.to_owned(),
    };
    match std::fs::metadata(&target) {
        Ok(metadata) if metadata.is_file() => Ok(target),
        Ok(_) => refused("this is not a regular file", "choose another name"),
        Err(error) => Err(failed(&error)),
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

/// What a failure of the system means for whoever writes.
pub(crate) fn failed(error: &io::Error) -> Refused {
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
    Refused::Failed { reason: error.to_string(), hint }
}
