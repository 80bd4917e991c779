//! What was computed for the last few requests and steps: looked-at pictures, conditioning and
//! latents, found again by what they were computed from.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use candle_core::Tensor;
use image::RgbImage;
use sha2::{Digest, Sha256};

use crate::{diffusion::Grid, error::Result, vlm::Seen};

/// What a value was computed from.
pub(super) type Key = [u8; 32];

/// Sets of pictures as the vision-language model sees them: the request's and the last step's.
const SEEN_MAX: usize = 2;
/// Prompts with their pictures: a prompt and a negative one, for two steps.
const PROMPTS_MAX: usize = 4;
/// Pictures as latents, which are small.
const LATENTS_MAX: usize = 16;

/// Values of the last few keys.
#[derive(Debug)]
pub(super) struct Recent<V> {
    entries: Mutex<VecDeque<(Key, V)>>,
    capacity: usize,
}

/// Everything that is found again.
#[derive(Debug)]
pub(super) struct Memo {
    pub(super) seen: Recent<Seen>,
    pub(super) conditioning: Recent<Tensor>,
    pub(super) latents: Recent<(Tensor, Grid)>,
}

impl Default for Memo {
    fn default() -> Self {
        Self {
            seen: Recent::new(SEEN_MAX),
            conditioning: Recent::new(PROMPTS_MAX),
            latents: Recent::new(LATENTS_MAX),
        }
    }
}

impl Memo {
    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.seen.clear();
        self.conditioning.clear();
        self.latents.clear();
    }
}

impl<V: Clone> Recent<V> {
    fn new(capacity: usize) -> Self {
        Self { entries: Mutex::new(VecDeque::with_capacity(capacity)), capacity }
    }

    /// The value of `key`, computed where it is not known.
    pub(super) fn get_or(&self, key: Key, compute: impl FnOnce() -> Result<V>) -> Result<V> {
        if let Some(found) = self.find(&key) {
            return Ok(found);
        }
        let value = compute()?; // not under the lock: it may take minutes
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.truncate(self.capacity.saturating_sub(1));
        entries.push_front((key, value.clone()));
        Ok(value)
    }

    fn find(&self, key: &Key) -> Option<V> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let at = entries.iter().position(|(known, _)| known == key)?;
        let entry = entries.remove(at)?;
        let value = entry.1.clone();
        entries.push_front(entry);
        Some(value)
    }

    fn clear(&self) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The key of pictures, each with its size.
pub(super) fn key_of_pictures<'a>(pictures: impl IntoIterator<Item = &'a RgbImage>) -> Key {
    let mut hash = Sha256::new();
    for picture in pictures {
        hash.update(picture.width().to_le_bytes());
        hash.update(picture.height().to_le_bytes());
        hash.update(picture.as_raw());
    }
    hash.finalize().into()
}

/// The key of a text about pictures.
pub(super) fn key_of_text(pictures: &Key, text: &str) -> Key {
    Sha256::new().chain_update(pictures).chain_update(text).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recent_value_is_forgotten() {
        let recent: Recent<u32> = Recent::new(2);
        let key = |n: u8| [n; 32];
        let computed = |n: u8, value| recent.get_or(key(n), || Ok(value)).unwrap();
        assert_eq!((computed(1, 10), computed(2, 20), computed(1, 99)), (10, 20, 10));
        assert_eq!(computed(3, 30), 30);
        assert_eq!((computed(2, 21), computed(3, 99)), (21, 30)); // 2 was the oldest
        recent.clear();
        assert_eq!(computed(3, 31), 31);
        let failed = recent.get_or(key(4), || Err(crate::Error::Cancelled));
        assert!(failed.is_err() && computed(4, 40) == 40);
    }

    #[test]
    fn sizes_and_texts_make_other_keys() {
        let picture = |w, h| RgbImage::new(w, h);
        let key = |w, h| key_of_pictures([&picture(w, h)]);
        assert_ne!(key(2, 3), key(3, 2));
        assert_ne!(key_of_text(&key(2, 3), "a"), key_of_text(&key(2, 3), "b"));
        assert_ne!(key_of_text(&key(2, 3), "a"), key_of_text(&key(3, 2), "a"));
    }
}
