//! `--keep-steps`: the picture after each pass, as a file.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use pentimento::{
    Event, Observer, Result,
    pixels::{self, Overwrite, Picture},
};

/// Writes pictures as they come, and remembers the first failure.
pub(crate) struct KeptSteps {
    folder: PathBuf,
    overwrite: Overwrite,
    result: Mutex<Result<Vec<String>>>,
}

impl KeptSteps {
    /// Makes the folder.
    pub(crate) fn new(folder: &Path, overwrite: Overwrite) -> Result<Self> {
        fs_err::create_dir_all(folder)?;
        let kept =
            Self { folder: folder.to_owned(), overwrite, result: Mutex::new(Ok(Vec::new())) };
        // What would make the first picture impossible to write is told before any work.
        pixels::check_output(&kept.path(0), overwrite)?;
        Ok(kept)
    }

    /// What was done, but not quite as asked; or the first failure.
    pub(crate) fn finish(self) -> Result<Vec<String>> {
        self.result.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, index: usize) -> PathBuf {
        self.folder.join(format!("step-{}.png", index + 1))
    }

    fn write(&self, index: usize, picture: &Picture) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(notes) = &mut *result {
            match pixels::save(picture, self.path(index), self.overwrite, None) {
                Ok(more) => notes.extend(more),
                Err(error) => *result = Err(error),
            }
        }
    }
}

impl Observer for KeptSteps {
    fn event(&self, event: &Event<'_>) {
        if let Event::StepDone { index, picture, .. } = event {
            self.write(*index, picture);
        }
    }
}
