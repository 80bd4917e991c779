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
    /// Notes, once something was written.
    result: Mutex<Result<Option<Vec<String>>>>,
}

impl KeptSteps {
    /// Makes sure that the first picture can be written; the folder itself is made with it.
    pub(crate) fn new(folder: &Path, overwrite: Overwrite) -> Result<Self> {
        let kept = Self { folder: folder.to_owned(), overwrite, result: Mutex::new(Ok(None)) };
        let absent = |it: &&Path| !it.as_os_str().is_empty() && !it.exists();
        let absent: Vec<&Path> = folder.ancestors().take_while(absent).collect();
        let checked =
            kept.make_folder().and_then(|()| pixels::check_output(&kept.path(0), overwrite));
        for made in absent {
            drop(fs_err::remove_dir(made)); // one that someone uses by now stays
        }
        checked?;
        Ok(kept)
    }

    fn make_folder(&self) -> Result<()> {
        Ok(fs_err::create_dir_all(&self.folder)?)
    }

    /// What was done, but not quite as asked; or the first failure.
    pub(crate) fn finish(self) -> Result<Vec<String>> {
        let notes = self.result.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        let nothing = "--keep-steps: nothing was kept, as the edit was one pass";
        Ok(notes.unwrap_or_else(|| vec![nothing.to_owned()]))
    }

    fn path(&self, index: usize) -> PathBuf {
        self.folder.join(format!("step-{}.png", index + 1))
    }

    fn write(&self, index: usize, picture: &Picture) {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(notes) = &mut *result {
            let saved = self
                .make_folder()
                .and_then(|()| pixels::save(picture, self.path(index), self.overwrite, None));
            match saved {
                Ok(more) => notes.get_or_insert_default().extend(more),
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
