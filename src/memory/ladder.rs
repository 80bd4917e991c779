//! What is tried, rung by rung, when an allocation fails although it was to fit.

use crate::error::{Error, Result};

/// A way to make room, from the cheapest on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// What is kept for later requests is dropped.
    DropCaches,
    /// The two predictions of guidance are made one after the other.
    SplitGuidance,
    /// The autoencoder works in tiles, or in smaller ones.
    TileAutoencoder,
    /// The transformer's blocks are read when their turn comes.
    StreamBlocks,
}

impl Rung {
    /// All, in their order.
    pub const ALL: [Self; 4] =
        [Self::DropCaches, Self::SplitGuidance, Self::TileAutoencoder, Self::StreamBlocks];

    /// What was done, for a person.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::DropCaches => "dropped what was kept for later",
            Self::SplitGuidance => "made the two predictions of guidance one after the other",
            Self::TileAutoencoder => "let the autoencoder work in tiles",
            Self::StreamBlocks => "streamed the transformer's blocks",
        }
    }
}

/// The rungs of one request. Each is taken once at most, whatever the stage it was taken in.
#[derive(Debug, Default)]
pub struct Ladder {
    taken: Vec<Rung>,
    next: usize,
}

impl Ladder {
    /// What was done, in its order.
    #[must_use]
    pub fn taken(&self) -> &[Rung] {
        &self.taken
    }

    /// Runs `work`; where it runs out of memory, makes room by the next rung that `descend` can
    /// take and runs it again. `descend` returns whether its rung makes a difference.
    ///
    /// # Errors
    /// The last failure, when every rung was taken; any other failure at once.
    pub fn run<S: ?Sized, T>(
        &mut self,
        state: &mut S,
        mut work: impl FnMut(&mut S) -> Result<T>,
        mut descend: impl FnMut(&mut S, Rung) -> bool,
    ) -> Result<T> {
        loop {
            let error = match work(state) {
                Err(error) if is_out_of_memory(&error) => error,
                other => return other,
            };
            if !self.descend(state, &mut descend) {
                return Err(typed(error));
            }
        }
    }

    fn descend<S: ?Sized>(
        &mut self,
        state: &mut S,
        descend: &mut impl FnMut(&mut S, Rung) -> bool,
    ) -> bool {
        while let Some(&rung) = Rung::ALL.get(self.next) {
            self.next += 1;
            if descend(state, rung) {
                self.taken.push(rung);
                return true;
            }
        }
        false
    }
}

/// Whether a failure is a lack of memory, of ours or of the device.
#[must_use]
pub fn is_out_of_memory(error: &Error) -> bool {
    match error {
        Error::OutOfMemory { .. } => true,
        // The driver's message stands somewhere in candle's chain of causes.
        Error::Tensor(error) => {
            let text = format!("{error:?}").to_ascii_lowercase();
            ["out_of_memory", "out of memory", "outofmemory"].iter().any(|word| text.contains(word))
        }
        _ => false,
    }
}

/// A lack of memory in the library's own words.
fn typed(error: Error) -> Error {
    match error {
        Error::Tensor(error) => {
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or_default();
            Error::OutOfMemory {
                what: format!("the device ({reason})"),
                needed_bytes: 0,
                available_bytes: 0,
                hint:
                    "a smaller --area or a smaller --dtype; other programs may hold the device's \
                       memory"
                        .to_owned(),
            }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{
        Limit,
        ledger::{DeviceMemory, Lease},
        pool::{Injected, SimulatedDevice},
    };

    const MIB: u64 = 1 << 20;

    /// A request in miniature: caches, a planner's turn, blocks, an autoencoder.
    struct Work {
        memory: DeviceMemory,
        caches: Vec<Lease>,
        /// Predictions that are made together.
        branches: u64,
        tiles: u64,
        streamed: bool,
    }

    impl Work {
        fn new(device: SimulatedDevice) -> Self {
            let memory = DeviceMemory::new(device, Limit::Free);
            Self { memory, caches: Vec::new(), branches: 2, tiles: 1, streamed: false }
        }

        fn edit(&mut self) -> Result<u64> {
            if self.caches.is_empty() {
                self.caches.push(self.memory.lease("caches", 4 * MIB)?);
            }
            let planner: Vec<Lease> =
                (0..4).map(|_| self.memory.lease("planner", 10 * MIB)).collect::<Result<_>>()?;
            drop(planner);
            let stay = if self.streamed { 1 } else { 6 };
            let blocks: Vec<Lease> =
                (0..stay).map(|_| self.memory.lease("editor", 9 * MIB)).collect::<Result<_>>()?;
            for _ in stay..6 {
                drop(self.memory.lease("editor", 9 * MIB)?);
            }
            drop(self.memory.lease("activations", self.branches * 4 * MIB)?);
            for _ in 0..self.tiles {
                let bytes = (30 * MIB).div_ceil(self.tiles);
                drop(self.memory.lease("autoencoder", bytes)?);
            }
            drop(blocks);
            Ok(42)
        }

        fn descend(&mut self, rung: Rung) -> bool {
            match rung {
                Rung::DropCaches => !std::mem::take(&mut self.caches).is_empty(),
                Rung::SplitGuidance => std::mem::replace(&mut self.branches, 1) != 1,
                Rung::TileAutoencoder => std::mem::replace(&mut self.tiles, 4) != 4,
                Rung::StreamBlocks => !std::mem::replace(&mut self.streamed, true),
            }
        }

        fn held(&self) -> u64 {
            self.memory.holdings().values().map(|holding| holding.now).sum()
        }
    }

    fn run(device: SimulatedDevice) -> (Result<u64>, Vec<Rung>, Work) {
        let (mut work, mut ladder) = (Work::new(device), Ladder::default());
        let result = ladder.run(&mut work, Work::edit, Work::descend);
        (result, ladder.taken().to_vec(), work)
    }

    #[track_caller]
    fn check_nothing_leaks(mut work: Work) {
        work.caches.clear();
        assert_eq!(work.held(), 0);
        assert_eq!(work.memory.usage().used, 0);
    }

    #[test]
    fn a_failure_at_any_allocation_is_mended_or_told() {
        let (result, taken, work) = run(SimulatedDevice::new(200 * MIB));
        assert!(matches!(result, Ok(42)) && taken.is_empty());
        check_nothing_leaks(work);
        for index in 0..40 {
            for injected in [Injected::Nth(index), Injected::From(index)] {
                let (result, taken, work) = run(SimulatedDevice::new(200 * MIB).failing(injected));
                match (result, injected) {
                    (Ok(42), Injected::Nth(_)) => assert!(taken.len() <= 1, "{injected:?}"),
                    (Ok(42), _) => assert!(taken.is_empty() && index >= 13, "{injected:?}"),
                    (Err(Error::OutOfMemory { .. }), Injected::From(_)) => {
                        let mut once = taken.clone();
                        once.dedup();
                        assert_eq!(once, taken);
                        assert!(taken.is_sorted());
                    }
                    (other, _) => panic!("{injected:?}: {other:?}"),
                }
                check_nothing_leaks(work);
            }
        }
    }

    #[test]
    fn less_memory_takes_more_rungs() {
        let rungs = |mib: u64| {
            let (result, taken, work) = run(SimulatedDevice::new(mib * MIB));
            check_nothing_leaks(work);
            result.map(|_| taken)
        };
        assert_eq!(rungs(88).unwrap(), []);
        let all_but_streaming = &Rung::ALL[..3];
        assert_eq!(rungs(87).unwrap(), all_but_streaming);
        assert_eq!(rungs(66).unwrap(), all_but_streaming);
        assert_eq!(rungs(50).unwrap(), Rung::ALL);
        assert!(matches!(rungs(40), Err(Error::OutOfMemory { .. })));
    }

    proptest! {
        #[test]
        fn no_device_leaves_anything_behind(mib in 1_u64..120, index in 0_u64..40, above in 0_u64..40) {
            for injected in [Injected::Nth(index), Injected::From(index), Injected::Above(above * MIB)] {
                let (result, taken, work) = run(SimulatedDevice::new(mib * MIB).failing(injected));
                let told = matches!(result, Ok(42) | Err(Error::OutOfMemory { .. }));
                prop_assert!(told && taken.len() <= Rung::ALL.len());
                check_nothing_leaks(work);
            }
        }
    }

    #[test]
    fn other_failures_are_not_mended() {
        let mut ladder = Ladder::default();
        let mut calls = 0;
        let result: Result<()> = ladder.run(
            &mut calls,
            |calls| {
                *calls += 1;
                Err(Error::Cancelled)
            },
            |_, _| true,
        );
        assert!(matches!(result, Err(Error::Cancelled)) && calls == 1);
        let driver = candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY: out of memory".into());
        assert!(is_out_of_memory(&Error::Tensor(driver)));
        let other = candle_core::Error::Msg("CUDA_ERROR_ILLEGAL_ADDRESS".into());
        assert!(!is_out_of_memory(&Error::Tensor(other)));
    }
}
