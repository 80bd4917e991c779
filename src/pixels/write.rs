//! Pictures as files, which appear whole or not at all.

use std::{io::Write, path::Path};

use super::{
    encode::{Format, encode_to_vec},
    metadata::EditRecord,
    picture::Picture,
};
pub use crate::whole_file::Overwrite;
use crate::{
    error::{PictureError, Result},
    whole_file::{Refused, WholeFile, failed},
};

/// Checks before any work that `path` can be written, and says in which format.
///
/// # Errors
/// An extension without format, a folder that is missing or not writable, a path that is a folder
/// or a device, a file that exists and may not be replaced.
pub fn check_output(path: &Path, overwrite: Overwrite) -> Result<Format> {
    let format = Format::from_path(path)?;
    // Only an attempt tells whether the folder takes files; the file goes at once.
    drop(WholeFile::create(path, overwrite).map_err(|refused| error(path, refused))?);
    Ok(format)
}

/// Encodes a picture in the format of the path's extension and writes it; returns notes on what
/// the format does not keep.
///
/// # Errors
/// What [`check_output`], [`encode_to_vec`] and [`write_file`] refuse.
pub fn save(
    picture: &Picture,
    path: impl AsRef<Path>,
    overwrite: Overwrite,
    record: Option<&EditRecord>,
) -> Result<Vec<String>> {
    let path = path.as_ref();
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
    let written = WholeFile::create(path, overwrite).and_then(|mut file| {
        file.write_all(bytes).map_err(|error| failed(&error))?;
        file.put_in_place()
    });
    written.map_err(|refused| error(path, refused))
}

fn error(path: &Path, refused: Refused) -> crate::Error {
    let path = path.to_owned();
    match refused {
        Refused::Exists => PictureError::Exists { path }.into(),
        Refused::Failed { reason, hint } => {
            PictureError::Write { path, reason, hint: hint.to_owned() }.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, ErrorKind};

    use super::*;

    #[test]
    fn a_full_disk_says_so() {
        let full = failed(&io::Error::from(ErrorKind::StorageFull));
        let message = error(Path::new("out.png"), full).to_string();
        assert!(message.starts_with("out.png: cannot write the picture: "), "{message}");
        assert!(message.contains("free space on the disk"), "{message}");
    }
}
