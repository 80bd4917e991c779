//! A device's memory as a pool: what it counts, and what a simulated one does.

use std::collections::BTreeMap;

/// The counters of a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Taken now.
    pub used: u64,
    /// The most that was taken at a time.
    pub used_high: u64,
    /// Held by the pool now, taken or free to be taken again without asking the system.
    pub reserved: u64,
    /// The most that the pool held at a time.
    pub reserved_high: u64,
}

/// A piece of a pool's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u64);

/// An allocation that failed, with what was free at that time in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for {wanted} bytes, {free} are free")]
pub struct PoolExhausted {
    /// What was asked for.
    pub wanted: u64,
    /// What was free, in one piece or in several.
    pub free: u64,
}

/// Memory of one device. What is freed stays with the pool until [`Pool::trim`], so that the next
/// model takes it without a call to the system.
pub trait Pool: Send {
    /// Takes memory.
    ///
    /// # Errors
    /// No piece that is large enough.
    fn allocate(&mut self, bytes: u64) -> Result<BlockId, PoolExhausted>;

    /// Gives memory back to the pool. Blocks that are not the pool's are ignored.
    fn free(&mut self, block: BlockId);

    /// Lets the pool hold at least so many bytes from now on.
    ///
    /// # Errors
    /// More than there is.
    fn reserve(&mut self, bytes: u64) -> Result<(), PoolExhausted>;

    /// Gives back to the system what is not taken.
    fn trim(&mut self);

    /// The counters.
    fn usage(&self) -> PoolUse;

    /// All that the device has, in bytes, where it says.
    fn capacity(&self) -> Option<u64>;
}

/// Host memory: the system's allocator hands it out, and this counts.
#[derive(Debug, Default)]
pub struct HostPool {
    blocks: BTreeMap<u64, u64>,
    next: u64,
    usage: PoolUse,
}

impl Pool for HostPool {
    fn allocate(&mut self, bytes: u64) -> Result<BlockId, PoolExhausted> {
        let free = super::available_bytes().unwrap_or(u64::MAX);
        if bytes > free {
            return Err(PoolExhausted { wanted: bytes, free });
        }
        self.next += 1;
        self.blocks.insert(self.next, bytes);
        self.usage.used += bytes;
        self.usage.used_high = self.usage.used_high.max(self.usage.used);
        // The system takes back what is free, so nothing is held beyond what is taken.
        self.usage.reserved = self.usage.used;
        self.usage.reserved_high = self.usage.used_high;
        Ok(BlockId(self.next))
    }

    fn free(&mut self, block: BlockId) {
        self.usage.used -= self.blocks.remove(&block.0).unwrap_or(0);
        self.usage.reserved = self.usage.used;
    }

    fn reserve(&mut self, bytes: u64) -> Result<(), PoolExhausted> {
        let free = super::available_bytes().unwrap_or(u64::MAX);
        let wanted = bytes.saturating_sub(self.usage.used);
        if wanted > free { Err(PoolExhausted { wanted, free }) } else { Ok(()) }
    }

    fn trim(&mut self) {
        super::heap::give_back();
    }

    fn usage(&self) -> PoolUse {
        self.usage
    }

    fn capacity(&self) -> Option<u64> {
        super::available_bytes().map(|free| free.saturating_add(self.usage.used))
    }
}

/// Which allocations of a [`SimulatedDevice`] fail whatever is free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Injected {
    /// None.
    #[default]
    Nothing,
    /// The allocation of this number, from 0, once.
    Nth(u64),
    /// The allocation of this number and all after it.
    From(u64),
    /// Those of more bytes than this.
    Above(u64),
}

/// A device that exists only as an address range: blocks are placed where they first fit, so that
/// it fragments, and allocations fail where that was asked for.
#[derive(Debug)]
pub struct SimulatedDevice {
    capacity: u64,
    /// Start and length of what is taken.
    taken: BTreeMap<u64, u64>,
    /// Start of each block, by its number.
    starts: BTreeMap<u64, u64>,
    allocations: u64,
    injected: Injected,
    usage: PoolUse,
}

impl SimulatedDevice {
    /// All addresses are multiples of this.
    pub const ALIGNMENT: u64 = 512;

    /// A device with so many bytes.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            taken: BTreeMap::new(),
            starts: BTreeMap::new(),
            allocations: 0,
            injected: Injected::Nothing,
            usage: PoolUse::default(),
        }
    }

    /// The same device with failures.
    #[must_use]
    pub fn failing(self, injected: Injected) -> Self {
        Self { injected, ..self }
    }

    /// Allocations that were asked for so far.
    #[must_use]
    pub fn allocations(&self) -> u64 {
        self.allocations
    }

    /// The first gap that holds `bytes`.
    fn first_fit(&self, bytes: u64) -> Option<u64> {
        let mut start = 0;
        for (&taken, &length) in &self.taken {
            if taken - start >= bytes {
                return Some(start);
            }
            start = taken + length;
        }
        (self.capacity.saturating_sub(start) >= bytes).then_some(start)
    }

    fn fails(&self, number: u64, bytes: u64) -> bool {
        match self.injected {
            Injected::Nothing => false,
            Injected::Nth(nth) => number == nth,
            Injected::From(first) => number >= first,
            Injected::Above(most) => bytes > most,
        }
    }
}

impl Pool for SimulatedDevice {
    fn allocate(&mut self, bytes: u64) -> Result<BlockId, PoolExhausted> {
        let number = self.allocations;
        self.allocations += 1;
        let free = self.capacity - self.usage.used;
        let length = bytes.max(1).next_multiple_of(Self::ALIGNMENT);
        let fit = if self.fails(number, bytes) { None } else { self.first_fit(length) };
        let Some(start) = fit else { return Err(PoolExhausted { wanted: bytes, free }) };
        self.taken.insert(start, length);
        self.starts.insert(number, start);
        self.usage.used += length;
        self.usage.used_high = self.usage.used_high.max(self.usage.used);
        // The pool holds every address up to the highest that was ever taken, until it is trimmed.
        self.usage.reserved = self.usage.reserved.max(start + length);
        self.usage.reserved_high = self.usage.reserved_high.max(self.usage.reserved);
        Ok(BlockId(number))
    }

    fn free(&mut self, block: BlockId) {
        let Some(start) = self.starts.remove(&block.0) else { return };
        self.usage.used -= self.taken.remove(&start).unwrap_or(0);
    }

    fn reserve(&mut self, bytes: u64) -> Result<(), PoolExhausted> {
        if bytes > self.capacity {
            return Err(PoolExhausted { wanted: bytes, free: self.capacity - self.usage.used });
        }
        self.usage.reserved = self.usage.reserved.max(bytes);
        self.usage.reserved_high = self.usage.reserved_high.max(self.usage.reserved);
        Ok(())
    }

    fn trim(&mut self) {
        let end = self.taken.iter().next_back().map_or(0, |(start, length)| start + length);
        self.usage.reserved = end;
    }

    fn usage(&self) -> PoolUse {
        self.usage
    }

    fn capacity(&self) -> Option<u64> {
        Some(self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = SimulatedDevice::ALIGNMENT;

    #[test]
    fn free_memory_in_pieces_is_no_room() {
        let mut device = SimulatedDevice::new(8 * UNIT);
        let blocks: Vec<BlockId> = (0..8).map(|_| device.allocate(UNIT).unwrap()).collect();
        blocks.iter().step_by(2).for_each(|&block| device.free(block));
        assert_eq!(device.usage().used, 4 * UNIT);
        let fault = device.allocate(2 * UNIT).unwrap_err();
        assert_eq!(fault, PoolExhausted { wanted: 2 * UNIT, free: 4 * UNIT });
        device.free(blocks[1]);
        device.allocate(3 * UNIT).unwrap();
        device.free(BlockId(99)); // not one of its own
        assert_eq!(device.usage().used, 6 * UNIT);
    }

    #[test]
    fn a_pool_holds_what_is_freed_until_it_is_trimmed() {
        let mut device = SimulatedDevice::new(8 * UNIT);
        let (low, high) = (device.allocate(UNIT).unwrap(), device.allocate(5 * UNIT).unwrap());
        device.free(high);
        assert_eq!((device.usage().used, device.usage().reserved), (UNIT, 6 * UNIT));
        device.trim();
        assert_eq!((device.usage().reserved, device.usage().reserved_high), (UNIT, 6 * UNIT));
        device.free(low);
        device.reserve(4 * UNIT).unwrap();
        assert_eq!(device.usage().reserved, 4 * UNIT);
        assert!(device.reserve(9 * UNIT).is_err());
    }

    #[test]
    fn failures_come_where_they_were_asked_for() {
        let tries = |injected| {
            let mut device = SimulatedDevice::new(99 * UNIT).failing(injected);
            [1, 3, 2, 1].map(|units| device.allocate(units * UNIT).is_ok())
        };
        assert_eq!(tries(Injected::Nothing), [true; 4]);
        assert_eq!(tries(Injected::Nth(1)), [true, false, true, true]);
        assert_eq!(tries(Injected::From(2)), [true, true, false, false]);
        assert_eq!(tries(Injected::Above(2 * UNIT)), [true, false, true, true]);
    }

    #[test]
    fn the_host_counts() {
        let mut host = HostPool::default();
        let block = host.allocate(1000).unwrap();
        host.free(block);
        assert_eq!((host.usage().used, host.usage().used_high), (0, 1000));
        assert!(host.reserve(u64::MAX).is_err() || super::super::available_bytes().is_none());
    }
}
