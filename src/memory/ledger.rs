//! One device's memory for every model: who holds how much of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    Limit,
    pool::{BlockId, Pool, PoolExhausted, PoolUse},
};
use crate::error::{Error, Result};

/// What one owner holds, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Holding {
    /// Now.
    pub now: u64,
    /// At most.
    pub high: u64,
}

/// The memory of one device, from which planner and editor take under one budget. Clones share it.
#[derive(Debug, Clone)]
pub struct DeviceMemory(Arc<Mutex<Ledger>>);

struct Ledger {
    pool: Box<dyn Pool>,
    limit: Limit,
    holdings: BTreeMap<&'static str, Holding>,
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("holdings", &self.holdings).finish_non_exhaustive()
    }
}

/// Memory in somebody's name; it is given back when this is dropped.
#[derive(Debug)]
pub struct Lease {
    memory: DeviceMemory,
    owner: &'static str,
    block: BlockId,
    bytes: u64,
}

impl DeviceMemory {
    /// The memory of the pool, of which `limit` may be used.
    #[must_use]
    pub fn new(pool: impl Pool + 'static, limit: Limit) -> Self {
        let ledger = Ledger { pool: Box::new(pool), limit, holdings: BTreeMap::new() };
        Self(Arc::new(Mutex::new(ledger)))
    }

    /// Takes memory in the name of `owner`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where the budget or the pool has no room.
    pub fn lease(&self, owner: &'static str, bytes: u64) -> Result<Lease> {
        let mut ledger = self.lock();
        let room = ledger.room();
        if room.is_some_and(|room| bytes > room) {
            return Err(refused(owner, bytes, room.unwrap_or(0)));
        }
        let block = ledger
            .pool
            .allocate(bytes)
            .map_err(|PoolExhausted { wanted, free }| refused(owner, wanted, free))?;
        let holding = ledger.holdings.entry(owner).or_default();
        holding.now += bytes;
        holding.high = holding.high.max(holding.now);
        Ok(Lease { memory: self.clone(), owner, block, bytes })
    }

    /// Refuses work that cannot fit, before it starts. What is held already may be counted as given
    /// up first: `given_up` bytes of it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with both numbers.
    pub fn require(&self, what: &str, bytes: u64, given_up: u64, hint: &str) -> Result<()> {
        match self.lock().room().map(|room| room.saturating_add(given_up)) {
            Some(room) if bytes > room => Err(Error::OutOfMemory {
                what: what.to_owned(),
                needed_bytes: bytes,
                available_bytes: room,
                hint: hint.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Bytes that may still be taken; `None` where nobody knows.
    #[must_use]
    pub fn room(&self) -> Option<u64> {
        self.lock().room()
    }

    /// Who holds how much; owners that gave everything back are there for their highest count.
    #[must_use]
    pub fn holdings(&self) -> BTreeMap<&'static str, Holding> {
        self.lock().holdings.clone()
    }

    /// The pool's own counters.
    #[must_use]
    pub fn usage(&self) -> PoolUse {
        self.lock().pool.usage()
    }

    /// Lets the pool hold so many bytes, which planner and editor then share without growth.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where there is less.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let reserved = self.lock().pool.reserve(bytes);
        reserved.map_err(|PoolExhausted { wanted, free }| refused("the pool", wanted, free))
    }

    /// Gives back to the system what nobody holds.
    pub fn trim(&self) {
        self.lock().pool.trim();
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    fn room(&self) -> Option<u64> {
        let used = self.pool.usage().used;
        let free = self.pool.capacity().map(|capacity| capacity.saturating_sub(used));
        self.limit.room(used, free)
    }
}

impl Lease {
    /// How much it is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut ledger = self.memory.lock();
        ledger.pool.free(self.block);
        if let Some(holding) = ledger.holdings.get_mut(self.owner) {
            holding.now -= self.bytes;
        }
    }
}

fn refused(owner: &str, needed_bytes: u64, available_bytes: u64) -> Error {
    Error::OutOfMemory {
        what: owner.to_owned(),
        needed_bytes,
        available_bytes,
        hint: "a smaller --area, a smaller --dtype or a larger --max-vram".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::pool::SimulatedDevice;

    const MIB: u64 = 1 << 20;

    #[test]
    fn owners_share_one_budget() {
        let memory = DeviceMemory::new(SimulatedDevice::new(100 * MIB), Limit::AtMost(60 * MIB));
        let planner = memory.lease("planner", 40 * MIB).unwrap();
        assert_eq!(memory.room(), Some(20 * MIB));
        let error = memory.lease("editor", 30 * MIB).unwrap_err();
        assert!(matches!(
            error,
            Error::OutOfMemory { needed_bytes, available_bytes, .. }
                if needed_bytes == 30 * MIB && available_bytes == 20 * MIB
        ));
        assert!(memory.require("an edit", 61 * MIB, 40 * MIB, "less").is_err());
        memory.require("an edit", 60 * MIB, 40 * MIB, "less").unwrap();
        drop(planner);
        let editor = memory.lease("editor", 60 * MIB).unwrap();
        assert_eq!(editor.bytes(), 60 * MIB);
        let holdings = memory.holdings();
        assert_eq!(holdings["planner"], Holding { now: 0, high: 40 * MIB });
        assert_eq!(holdings["editor"], Holding { now: 60 * MIB, high: 60 * MIB });
        drop(editor);
        assert!(memory.holdings().values().all(|holding| holding.now == 0));
        assert_eq!(memory.usage().used, 0);
    }

    #[test]
    fn switching_between_planner_and_editor_takes_nothing_new() {
        let memory = DeviceMemory::new(SimulatedDevice::new(100 * MIB), Limit::Free);
        // Layers of one size here, blocks of another there.
        let lease_all = |owner, count: u64, bytes| -> Vec<Lease> {
            (0..count).map(|_| memory.lease(owner, bytes).unwrap()).collect()
        };
        drop(lease_all("planner", 14, 5 * MIB));
        let after_first = memory.usage();
        for _ in 0..5 {
            drop(lease_all("editor", 10, 7 * MIB));
            drop(lease_all("planner", 14, 5 * MIB));
        }
        let usage = memory.usage();
        assert_eq!(usage.reserved_high, after_first.reserved_high);
        assert_eq!((usage.used, usage.used_high), (0, 70 * MIB));
        memory.trim();
        assert_eq!(memory.usage().reserved, 0);
    }
}
