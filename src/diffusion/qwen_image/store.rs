//! A model's repeated parts: kept in memory, or read from their file when their turn comes.

use std::{
    fmt,
    ops::ControlFlow,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{error::Result, progress::CancelToken};

/// What reads part `index`.
type Load<T> = Box<dyn Fn(usize, &CancelToken) -> Result<T> + Send + Sync>;

/// Parts that are used one after the other. The leading ones stay once they were read, the others
/// are read ahead by one on threads of their own and dropped after use.
pub(super) struct Store<T> {
    load: Load<T>,
    kept: Mutex<Vec<Option<Arc<T>>>>,
    stay: AtomicUsize,
}

impl<T> fmt::Debug for Store<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stay = self.stay.load(Ordering::Relaxed);
        f.debug_struct("Store").field("stay", &stay).finish_non_exhaustive()
    }
}

impl<T: Send + Sync> Store<T> {
    /// `count` parts, of which the leading `stay` stay once they were read. None is read yet.
    pub(super) fn new(
        count: usize,
        stay: usize,
        load: impl Fn(usize, &CancelToken) -> Result<T> + Send + Sync + 'static,
    ) -> Self {
        let kept = Mutex::new((0..count).map(|_| None).collect());
        Self { load: Box::new(load), kept, stay: AtomicUsize::new(stay) }
    }

    /// Gives the part that was read to be looked at; it is dropped where it does not stay.
    pub(super) fn offer(&self, index: usize, part: T) {
        if index < self.stay.load(Ordering::Relaxed) {
            self.lock()[index] = Some(Arc::new(part));
        }
    }

    /// Lets the leading `stay` parts stay from now on, and drops the others.
    pub(super) fn set_stay(&self, stay: usize) {
        self.stay.store(stay, Ordering::Relaxed);
        self.lock().iter_mut().skip(stay).for_each(|part| *part = None);
    }

    /// Drops every part; those that are to stay are read again when they are next used.
    pub(super) fn release(&self) {
        self.lock().iter_mut().for_each(|part| *part = None);
    }

    /// Parts in memory.
    pub(super) fn in_memory(&self) -> usize {
        self.lock().iter().flatten().count()
    }

    /// All parts, where all are in memory.
    pub(super) fn whole(&self) -> Option<Vec<Arc<T>>> {
        self.lock().iter().cloned().collect()
    }

    /// Whether all parts that are to stay are in memory.
    pub(super) fn is_filled(&self) -> bool {
        let stay = self.stay.load(Ordering::Relaxed);
        self.lock().iter().take(stay).all(Option::is_some)
    }

    /// Reads the parts that are to stay.
    pub(super) fn fill(&self, cancel: &CancelToken) -> Result<()> {
        let count = self.stay.load(Ordering::Relaxed).min(self.lock().len());
        (0..count).try_for_each(|index| self.get(index, cancel).map(drop))
    }

    /// So many parts, which are these in turn.
    pub(super) fn repeated(self, count: usize) -> Self
    where
        T: 'static,
    {
        let Self { load, kept, .. } = self;
        let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
        let of = kept.len().max(1);
        let kept = kept.iter().cycle().take(count).cloned().collect();
        let load = move |index: usize, cancel: &CancelToken| load(index % of, cancel);
        Self { load: Box::new(load), kept: Mutex::new(kept), stay: AtomicUsize::new(count) }
    }

    /// Uses each part in its order, until `work` breaks off. While one is used, the next that is not
    /// in memory is read.
    pub(super) fn each(
        &self,
        cancel: &CancelToken,
        mut work: impl FnMut(usize, &T) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let count = self.lock().len();
        thread::scope(|scope| {
            let mut ahead: Option<(usize, thread::ScopedJoinHandle<'_, Result<Arc<T>>>)> = None;
            for index in 0..count {
                cancel.check()?;
                let part = match ahead.take_if(|(next, _)| *next == index) {
                    Some((_, reading)) => match reading.join() {
                        Ok(part) => part?,
                        Err(panic) => std::panic::resume_unwind(panic),
                    },
                    None => self.get(index, cancel)?,
                };
                if ahead.is_none()
                    && let Some(next) = self.next_absent(index + 1)
                {
                    let read = move || readers().install(|| self.get(next, cancel));
                    ahead = Some((next, scope.spawn(read)));
                }
                if work(index, &part)?.is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    /// The first part from `from` on that is not in memory.
    fn next_absent(&self, from: usize) -> Option<usize> {
        let kept = self.lock();
        (from..kept.len()).find(|&index| kept[index].is_none())
    }

    fn get(&self, index: usize, cancel: &CancelToken) -> Result<Arc<T>> {
        if let Some(part) = &self.lock()[index] {
            return Ok(Arc::clone(part));
        }
        let part = Arc::new((self.load)(index, cancel)?); // not under the lock: it takes a while
        if index < self.stay.load(Ordering::Relaxed) {
            self.lock()[index] = Some(Arc::clone(&part));
        }
        Ok(part)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Option<Arc<T>>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads that read ahead. They are not those of the computation: a thread that waits for a part
/// may be the only one of its pool, which the reading must not depend on.
pub(super) fn readers() -> &'static ThreadPool {
    static READERS: OnceLock<ThreadPool> = OnceLock::new();
    READERS.get_or_init(|| {
        const MOST: usize = 4;
        let half = thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
        let builder = ThreadPoolBuilder::new().thread_name(|i| format!("reader-{i}"));
        builder
            .num_threads(half.min(MOST))
            .build()
            .expect("a system that runs out of threads before work begins is of no use")
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::error::Error;

    /// A part that counts how many of its kind there are.
    struct Part(usize, Arc<AtomicUsize>);

    impl Drop for Part {
        fn drop(&mut self) {
            self.1.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn counted(count: usize, stay: usize) -> (Store<Part>, Arc<AtomicUsize>, Arc<AtomicUsize>) {
        let (alive, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let counters = (Arc::clone(&alive), Arc::clone(&most));
        let store = Store::new(count, stay, move |index, cancel: &CancelToken| {
            cancel.check()?;
            let now = alive.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(now, Ordering::SeqCst);
            Ok(Part(index, Arc::clone(&alive)))
        });
        (store, counters.0, counters.1)
    }

    /// Uses every part once; returns their numbers.
    fn used(store: &Store<Part>) -> Vec<usize> {
        let mut seen = Vec::new();
        let note = |index, part: &Part| {
            assert_eq!(part.0, index);
            seen.push(index);
            Ok(ControlFlow::Continue(()))
        };
        store.each(&CancelToken::new(), note).unwrap();
        seen
    }

    #[test]
    fn parts_come_in_order_and_no_more_than_two_beside_those_that_stay() {
        let cases = [1, 2, 3, 7].into_iter().flat_map(|n| (0..=n).map(move |stay| (n, stay)));
        for (count, stay) in cases {
            let (store, alive, most) = counted(count, stay);
            for _ in 0..2 {
                assert_eq!(used(&store), (0..count).collect::<Vec<_>>());
                assert_eq!(alive.load(Ordering::SeqCst), stay);
            }
            assert!(most.load(Ordering::SeqCst) <= count.min(stay + 2), "{count} {stay}");
            assert_eq!(store.in_memory(), stay);
            store.release();
            assert_eq!(alive.load(Ordering::SeqCst), 0);
        }
    }

    #[test]
    fn fewer_parts_can_stay_later() {
        let (store, alive, _) = counted(5, 5);
        store.fill(&CancelToken::new()).unwrap();
        assert_eq!(alive.load(Ordering::SeqCst), 5);
        assert_eq!(store.whole().map(|parts| parts.len()), Some(5));
        store.set_stay(2);
        assert_eq!(alive.load(Ordering::SeqCst), 2);
        assert!(store.whole().is_none());
        assert_eq!(used(&store).len(), 5);
        assert_eq!(alive.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_failure_and_a_cancellation_leave_nothing_behind() {
        let (store, alive, _) = counted(6, 0);
        let cancel = CancelToken::new();
        let stopped = store.each(&cancel, |index, _| {
            if index == 2 {
                cancel.cancel();
            }
            Ok(ControlFlow::Continue(()))
        });
        assert!(matches!(stopped, Err(Error::Cancelled)));
        assert_eq!(alive.load(Ordering::SeqCst), 0);
        let failing: Store<()> = Store::new(3, 0, |index, _| match index {
            1 => Err(Error::field("part", index, "another")),
            _ => Ok(()),
        });
        let go_on = |_, (): &()| Ok(ControlFlow::Continue(()));
        assert!(failing.each(&CancelToken::new(), go_on).is_err());
    }

    #[test]
    fn a_pool_of_one_thread_does_not_wait_for_itself() {
        let (store, _, _) = counted(4, 0);
        let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(pool.install(|| used(&store)), [0, 1, 2, 3]);
    }

    #[test]
    fn who_breaks_off_gets_no_more_parts() {
        let (store, alive, most) = counted(9, 0);
        let mut seen = 0;
        let first_only = |_, _: &Part| {
            seen += 1;
            Ok(ControlFlow::Break(()))
        };
        store.each(&CancelToken::new(), first_only).unwrap();
        assert_eq!((seen, alive.load(Ordering::SeqCst)), (1, 0));
        assert!(most.load(Ordering::SeqCst) <= 2);
        let repeated = counted(2, 2).0.repeated(5);
        assert_eq!((repeated.in_memory(), used_numbers(&repeated)), (0, vec![0, 1, 0, 1, 0]));
    }

    fn used_numbers(store: &Store<Part>) -> Vec<usize> {
        let mut numbers = Vec::new();
        let note = |_, part: &Part| {
            numbers.push(part.0);
            Ok(ControlFlow::Continue(()))
        };
        store.each(&CancelToken::new(), note).unwrap();
        numbers
    }
}
