//! Memory that was freed and that the allocator still holds.

/// Lets the allocator give whole free pages back to the system. GNU's C library keeps what lies below
/// memory that is still in use, which after a model of gigabytes was dropped is a tenth of it.
pub(super) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[expect(unsafe_code, reason = "a call of the C library")]
        // SAFETY: it takes no pointer and touches only free memory, under the allocator's own locks.
        let _released = unsafe { libc::malloc_trim(0) };
    }
}
