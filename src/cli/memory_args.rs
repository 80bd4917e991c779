//! What can be typed about memory.

use clap::Args;
use pentimento::memory::Limit;

/// How much memory may be used, and how it is saved.
#[derive(Debug, Args)]
#[command(next_help_heading = "Memory")]
pub(crate) struct MemoryArgs {
    /// Host memory that may be used, in GiB; a negative number leaves that much free [default: what
    /// the system has free]
    #[arg(
        long,
        value_name = "GIB",
        value_parser = gib,
        allow_hyphen_values = true,
        env = "PENTIMENTO_MAX_RAM"
    )]
    pub(crate) max_ram: Option<Limit>,
    /// The same for the memory of a GPU; of a number above zero a sixteenth is left to the driver's
    /// pool, which cannot use all it holds
    #[arg(
        long,
        value_name = "GIB",
        value_parser = gib,
        allow_hyphen_values = true,
        env = "PENTIMENTO_MAX_VRAM"
    )]
    pub(crate) max_vram: Option<Limit>,
    /// Hold one model at a time: the vision-language model and the transformer take turns, each
    /// read from its file again when it is needed [default: where both do not fit]
    #[arg(long, aliases = ["offload-to-cpu", "low-ram"])]
    pub(crate) offload: bool,
    /// Read the transformer's blocks from their file in every step, but for so many that stay
    /// [default: as few as fit]
    #[arg(long, value_name = "STAY", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub(crate) stream_layers: Option<usize>,
    /// Let the autoencoder work in tiles [default: above 2 million pixels, and where the whole does
    /// not fit]
    #[arg(long)]
    pub(crate) vae_tiling: bool,
    /// Side of the autoencoder's tiles in pixels
    #[arg(long, value_name = "PX", value_parser = clap::value_parser!(u16).range(64..))]
    pub(crate) vae_tile_size: Option<u16>,
}

/// Bytes of GiB; below 0, what is to be left free.
fn gib(text: &str) -> Result<Limit, String> {
    const BYTES_PER_GIB: f64 = 1_073_741_824.0;
    let gib: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if !(gib.abs() > 0.0 && gib.abs() < 1e6) {
        return Err("expected a number of GiB, or one below 0 to leave free".to_owned());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    let bytes = (gib.abs() * BYTES_PER_GIB) as u64;
    Ok(if gib > 0.0 { Limit::AtMost(bytes) } else { Limit::LeaveFree(bytes) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_checked() {
        assert_eq!(gib("0.5"), Ok(Limit::AtMost(1 << 29)));
        assert_eq!(gib("-1.5"), Ok(Limit::LeaveFree(3 << 29)));
        assert!(gib("0").is_err() && gib("nan").is_err() && gib("1e9").is_err());
    }
}
