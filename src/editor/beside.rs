//! Two pieces of work at the same time: weights are read while the planner writes.

use std::thread;

use crate::{
    error::{Error, Result},
    progress::CancelToken,
};

/// Runs `load` on a thread of its own while `work` runs on this one, and waits for both.
///
/// What fails first stops the other, and is what the caller hears of. `cancel` stops both. Neither sees
/// what the other does, so the results are those of one after the other.
///
/// # Errors
/// What either fails with; [`Error::Cancelled`] where `cancel` did it.
pub(super) fn beside<L: Send, T>(
    cancel: &CancelToken,
    load: impl FnOnce(&CancelToken) -> Result<L> + Send,
    work: impl FnOnce(&CancelToken) -> Result<T>,
) -> Result<(L, T)> {
    let both = cancel.child();
    thread::scope(|scope| {
        let _even_after_a_panic = StopsWhenDropped(&both);
        let loading = scope.spawn(|| {
            let loaded = load(&both);
            if loaded.is_err() {
                both.cancel();
            }
            loaded
        });
        let worked = work(&both);
        if worked.is_err() {
            both.cancel();
        }
        let loaded = match loading.join() {
            Ok(loaded) => loaded,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        cancel.check()?;
        match (loaded, worked) {
            (Ok(loaded), Ok(worked)) => Ok((loaded, worked)),
            // The one that was stopped says nothing of the reason.
            (Err(Error::Cancelled), Err(error)) | (Err(error), _) | (_, Err(error)) => Err(error),
        }
    })
}

/// Stops what still runs, which the scope would wait for.
struct StopsWhenDropped<'a>(&'a CancelToken);

impl Drop for StopsWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Each side says that it runs, and goes on when the other has said so: one after the other they
    /// would wait forever.
    fn meet(say: &Sender<()>, hear: &Receiver<()>) {
        say.send(()).unwrap();
        hear.recv().unwrap();
    }

    fn until_stopped(cancel: &CancelToken) -> Result<()> {
        while !cancel.is_cancelled() {
            thread::yield_now();
        }
        cancel.check()
    }

    fn fault(name: &'static str) -> Error {
        Error::field(name, 1, 2)
    }

    #[test]
    fn both_run_at_the_same_time() {
        let ((to_load, from_work), (to_work, from_load)) = (channel(), channel());
        let load = move |_: &CancelToken| {
            meet(&to_work, &from_work);
            Ok(1)
        };
        let work = |_: &CancelToken| {
            meet(&to_load, &from_load);
            Ok(2)
        };
        assert_eq!(beside(&CancelToken::new(), load, work).unwrap(), (1, 2));
    }

    #[test]
    fn a_failure_stops_the_other_side_and_is_told() {
        let cancel = CancelToken::new();
        let stopped = |both: &CancelToken| until_stopped(both);
        let error = beside(&cancel, stopped, |_| Err::<(), _>(fault("plan"))).unwrap_err();
        assert_eq!(error.to_string(), fault("plan").to_string());
        let error = beside(&cancel, |_| Err::<(), _>(fault("load")), stopped).unwrap_err();
        assert_eq!(error.to_string(), fault("load").to_string());
        assert!(!cancel.is_cancelled(), "the caller's token is the caller's");
        let error = beside(&cancel, |_| Err::<(), _>(fault("late")), |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), fault("late").to_string());
    }

    #[test]
    fn cancellation_stops_both() {
        let cancel = CancelToken::new();
        let work = |both: &CancelToken| {
            cancel.cancel();
            until_stopped(both)
        };
        let result = beside(&cancel, until_stopped, work);
        assert!(matches!(result, Err(Error::Cancelled)));
        // Also where both ended before they looked.
        let work = |_: &CancelToken| {
            cancel.cancel();
            Ok(())
        };
        assert!(matches!(beside(&cancel, |_| Ok(()), work), Err(Error::Cancelled)));
    }

    #[test]
    fn a_panic_on_either_side_waits_for_nobody() {
        let caught = |load: fn(&CancelToken) -> Result<()>,
                      work: fn(&CancelToken) -> Result<()>| {
            std::panic::catch_unwind(|| beside(&CancelToken::new(), load, work)).is_err()
        };
        assert!(caught(until_stopped, |_| panic!("while it plans")));
        assert!(caught(|_| panic!("while it reads"), |_| Ok(())));
    }
}
