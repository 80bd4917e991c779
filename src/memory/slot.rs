//! A large value that can be dropped and made again.

use std::sync::{Arc, Mutex, PoisonError};

/// A place for a value that is made when it is first needed, and may be dropped in between.
#[derive(Debug)]
pub(crate) struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Slot<T> {
    /// The value, made by `make` where there is none. Callers on other threads wait for it rather
    /// than make a second one.
    ///
    /// # Errors
    /// What `make` fails with; the place stays empty.
    pub(crate) fn get_or<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<Arc<T>, E> {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = place.as_ref() {
            return Ok(Arc::clone(value));
        }
        Ok(Arc::clone(place.insert(Arc::new(make()?))))
    }

    /// Drops the value, as soon as nobody uses it any more.
    pub(crate) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Whether there is a value.
    pub(crate) fn is_full(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_made_when_it_is_needed() {
        let slot = Slot::default();
        assert!(slot.get_or(|| Err::<u32, _>("no")).is_err() && !slot.is_full());
        assert_eq!(*slot.get_or(|| Ok::<_, ()>(1)).unwrap(), 1);
        assert_eq!(*slot.get_or(|| Ok::<_, ()>(2)).unwrap(), 1);
        slot.clear();
        assert_eq!(*slot.get_or(|| Ok::<_, ()>(3)).unwrap(), 3);
    }
}
