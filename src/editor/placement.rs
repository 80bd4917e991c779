//! Which weights stay in memory: the first way that fits, or a refusal that says what would.

use super::estimate::{Facts, Models};
use crate::{
    diffusion::{GuidancePass, Residency},
    error::{Error, Result},
    memory::Limit,
    pixels::Size,
    request::{EditRequest, MemoryPlan, Placement},
    weights::{Precision, Storage},
};

/// Sides of the autoencoder's tiles, the largest first. With the first two, tiles of the published
/// autoencoder equal the whole but for rounding.
const TILES_PX: [usize; 4] = [1024, 512, 256, 128];
/// Sides of smaller working sizes that a refusal may name.
const SIDES_PX: [u64; 8] = [1024, 896, 768, 640, 512, 384, 256, 128];

/// What a caller wants, whatever fits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PlacementOptions {
    /// Let the vision-language model and the transformer take turns in memory.
    pub take_turns: bool,
    /// Read the transformer's blocks from their file each time, but for so many leading ones.
    pub stream_blocks: Option<usize>,
    /// Let the autoencoder work in tiles, of the largest side that makes a difference or of this
    /// one in pixels.
    pub tiles: Option<Option<usize>>,
    /// How the two predictions of guidance are made; `None` is one batch on a GPU where that fits
    /// without saving elsewhere, and one after the other anywhere else.
    pub guidance: Option<GuidancePass>,
}

/// Who asks for memory, and what is left of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) options: PlacementOptions,
    pub(super) limit: Limit,
    /// Bytes that the models and their work may take.
    pub(super) bytes: Option<u64>,
    /// On a GPU guidance in one batch is the faster way. On a CPU larger operations leave the caches sooner.
    pub(super) on_gpu: bool,
}

impl Room {
    /// The flag of the limit.
    pub(super) fn flag(&self) -> &'static str {
        if self.on_gpu { "--max-vram" } else { "--max-ram" }
    }

    /// How much more a limit has to be for so many bytes.
    fn ceiling_for(&self, bytes: u64) -> u64 {
        if self.on_gpu { Limit::with_pool(bytes) } else { bytes }
    }
}

/// The ways to place a request's work, in the order in which they are tried: everything stays; the
/// models take turns; the autoencoder works in tiles; the transformer's blocks are streamed, as few
/// as need be.
fn candidates(models: Models<'_>, facts: &Facts, options: PlacementOptions) -> Vec<Placement> {
    let layers = models.known.transformer.config().layers;
    let unit_px = models.known.autoencoder.pixels_per_latent();
    let working = facts.working();
    let smaller = |tile: &usize| tile.is_multiple_of(2 * unit_px) && is_tiled(working, *tile);
    let tiles = TILES_PX.into_iter().filter(smaller).map(Some);
    let tiles: Vec<Option<usize>> = match options.tiles {
        None => std::iter::once(None).chain(tiles).collect(),
        Some(None) => match tiles.clone().next() {
            None => vec![TILES_PX.last().copied()],
            Some(_) => tiles.collect(),
        },
        Some(side) => vec![side],
    };
    let residencies: Vec<Residency> = match options.stream_blocks {
        Some(blocks) => vec![Residency::Streamed { blocks }],
        None => {
            let streamed = (0..=layers).rev().map(|blocks| Residency::Streamed { blocks });
            std::iter::once(Residency::Resident).chain(streamed).collect()
        }
    };
    let guidance = options.guidance.filter(|_| facts.can_batch()).unwrap_or_default();
    let stays = (!options.take_turns).then_some(false);
    let mut all = Vec::new();
    for take_turns in stays.into_iter().chain([true]) {
        for &transformer in &residencies {
            // Both in memory and a transformer that is not: turns come first.
            if !take_turns && transformer != residencies[0] {
                continue;
            }
            for &tile_px in &tiles {
                // With all weights in memory, turns come before tiles, too.
                if take_turns || tile_px == tiles[0] {
                    all.push(Placement { take_turns, transformer, guidance, tile_px });
                }
            }
        }
    }
    all
}

/// The next smaller tiles than those of a placement that make a difference at `size`.
pub(super) fn smaller_tiles(placement: Placement, size: Size, unit_px: usize) -> Option<usize> {
    let now = placement.tile_px.unwrap_or(usize::MAX);
    let fits = |tile: &usize| tile.is_multiple_of(2 * unit_px) && *tile < now;
    TILES_PX.into_iter().filter(fits).find(|&tile| is_tiled(size, tile))
}

/// Whether tiles of this side leave a picture of this size in more than one.
fn is_tiled(size: Size, tile_px: usize) -> bool {
    size.width.max(size.height) as usize > tile_px
}

fn plan_of(models: Models<'_>, facts: &Facts, placement: Placement) -> MemoryPlan {
    let stages = models.stages(facts, placement);
    let peak_bytes = stages.iter().map(|stage| stage.in_use_bytes()).max().unwrap_or(0);
    let peak_bytes = peak_bytes.max(models.opening(placement));
    MemoryPlan {
        placement,
        stages,
        peak_bytes,
        available_bytes: None,
        hint: None,
        made_room: Vec::new(),
    }
}

/// The first placement that takes at most `bytes`, or the smallest of all.
fn first_fit(
    models: Models<'_>,
    facts: &Facts,
    Room { options, bytes, on_gpu, .. }: Room,
) -> (MemoryPlan, bool) {
    let mut smallest: Option<MemoryPlan> = None;
    let fits = |plan: &MemoryPlan| bytes.is_none_or(|bytes| plan.peak_bytes <= bytes);
    let may_batch = options.guidance.is_none() && on_gpu && facts.can_batch();
    for placement in candidates(models, facts, options) {
        let plan = plan_of(models, facts, placement);
        if fits(&plan) {
            let guidance = GuidancePass::OneBatch;
            let batch = may_batch
                .then(|| plan_of(models, facts, Placement { guidance, ..placement }))
                .filter(fits);
            return (batch.unwrap_or(plan), true);
        }
        if smallest.as_ref().is_none_or(|smallest| plan.peak_bytes < smallest.peak_bytes) {
            smallest = Some(plan);
        }
    }
    let plan = smallest.unwrap_or_else(|| plan_of(models, facts, Placement::RESIDENT));
    (plan, false)
}

/// Places a request's work; what does not fit carries a hint at what would.
pub(super) fn place(models: Models<'_>, request: &EditRequest, room: Room) -> Result<MemoryPlan> {
    let facts = Facts::of(models, request)?;
    let (mut plan, fits) = first_fit(models, &facts, room);
    plan.available_bytes = room.bytes;
    if !fits {
        plan.hint = Some(nearest(models, request, &plan, room)?);
    }
    Ok(plan)
}

/// Refuses a plan that does not fit.
pub(super) fn require(plan: MemoryPlan, what: &str) -> Result<MemoryPlan> {
    match (&plan.hint, plan.available_bytes) {
        (Some(hint), Some(available_bytes)) => Err(Error::OutOfMemory {
            what: what.to_owned(),
            needed_bytes: plan.peak_bytes,
            available_bytes,
            hint: hint.clone(),
        }),
        _ => Ok(plan),
    }
}

/// The nearest settings with which a request fits.
fn nearest(
    models: Models<'_>,
    request: &EditRequest,
    plan: &MemoryPlan,
    room: Room,
) -> Result<String> {
    let Some(bytes) = room.bytes else { return Ok(String::new()) };
    let mut ways = Vec::new();
    let facts = Facts::of(models, request)?;
    let storages = [("q8_0", Storage::Q8_0), ("q4_k", Storage::Q4K)];
    for (name, storage) in storages {
        let precision = Precision { storage, ..models.precision.clone() };
        let known = models.known.as_kept(&precision);
        let other = Models { known: &known, precision: &precision, ..models };
        let (other, fits) = first_fit(other, &facts, room);
        if fits && other.peak_bytes < plan.peak_bytes {
            ways.push(format!("--dtype {name}"));
            break;
        }
    }
    let working = facts.working().pixels();
    for side in SIDES_PX.into_iter().filter(|side| side * side < working) {
        let smaller =
            EditRequest { area: Some(side * side), width: None, height: None, ..request.clone() };
        let facts = Facts::of(models, &smaller)?;
        if first_fit(models, &facts, room).1 {
            // A side that was asked for rules over the area.
            let asked = request.width.is_some() || request.height.is_some();
            let instead = if asked { " in place of -W and -H" } else { "" };
            ways.push(format!("--area {side}x{side}{instead}"));
            break;
        }
    }
    ways.push(match room.limit {
        Limit::AtMost(most) => {
            let missing = plan.peak_bytes.saturating_sub(bytes);
            let more = most.saturating_add(room.ceiling_for(missing));
            format!("{} {}", room.flag(), gib_above(more))
        }
        Limit::LeaveFree(_) => format!("leave less free with {}", room.flag()),
        Limit::Free => {
            let missing = plan.peak_bytes.saturating_sub(bytes);
            format!("free {} GiB more by closing other programs", gib_above(missing))
        }
    });
    Ok(ways.join(", or "))
}

/// Bytes in GiB, rounded up in the third place.
fn gib_above(bytes: u64) -> String {
    const THOUSANDTHS_PER_GIB: u128 = 1000;
    let thousandths = (u128::from(bytes) * THOUSANDTHS_PER_GIB).div_ceil(1 << 30);
    format!("{}.{:03}", thousandths.div_euclid(1000), thousandths % 1000)
}

/// What a person should know about a placement; `None` where everything stays.
pub(super) fn note(placement: Placement, layers: usize) -> Option<String> {
    let mut parts = Vec::new();
    if placement.take_turns {
        parts.push("the vision-language model and the transformer take turns".to_owned());
    }
    if let Residency::Streamed { blocks } = placement.transformer {
        parts.push(format!("{} of {layers} blocks of the transformer stay", blocks.min(layers)));
    }
    if let Some(tile_px) = placement.tile_px {
        parts.push(format!("the autoencoder works in tiles of {tile_px} pixels"));
    }
    (!parts.is_empty()).then(|| format!("to save memory, {}", parts.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        diffusion::StepCache,
        editor::{EngineOptions, ModelSource, lora::Loras, open_models},
        memory::Device,
        pixels::Picture,
    };

    #[test]
    fn guidance_is_one_batch_where_that_is_faster_and_fits() {
        let options = EngineOptions { device: Device::Cpu, ..EngineOptions::default() };
        let files = ModelSource::Mini.files().unwrap();
        let loras = Loras::open(&[], false).unwrap();
        let precision = options.precision(&()).unwrap();
        let opened = open_models(&files, &options, &loras, precision, &()).unwrap();
        let picture = Picture::from_rgb(image::RgbImage::new(64, 64));
        let mut request = EditRequest::new(picture, "make it night");
        // Denoising takes the most.
        (request.width, request.height) = (Some(1024), Some(1024));
        request.strategy = crate::request::Strategy::Direct;
        let tiles = Some(Some(128));
        let room = |on_gpu, bytes, guidance| Room {
            options: PlacementOptions { tiles, guidance, ..PlacementOptions::default() },
            limit: Limit::Free,
            bytes,
            on_gpu,
        };
        let placed = |request: &EditRequest, room| {
            let plan = place(opened.models(), request, room).unwrap();
            (plan.placement, plan.peak_bytes)
        };
        let (in_turn, one_batch) = (GuidancePass::InTurn, GuidancePass::OneBatch);
        assert_eq!(placed(&request, room(true, None, None)).0.guidance, in_turn);
        request.negative_prompt = Some("blurry".to_owned());
        assert_eq!(placed(&request, room(false, None, None)).0.guidance, in_turn);
        let (alone, small) = placed(&request, room(false, None, None));
        let (together, large) = placed(&request, room(true, None, None));
        assert_eq!(together, Placement { guidance: one_batch, ..alone });
        assert!(large > small, "{large} {small}");
        // It is not worth any other way of saving memory.
        assert_eq!(placed(&request, room(true, Some(large), None)).0, together);
        assert_eq!(placed(&request, room(true, Some(large - 1), None)).0, alone);
        // What is asked for counts.
        assert_eq!(placed(&request, room(true, None, Some(in_turn))).0, alone);
        assert_eq!(placed(&request, room(false, None, Some(one_batch))).0, together);
        let saved = placed(&request, room(false, Some(large - 1), Some(one_batch))).0;
        assert!(saved.take_turns && saved.guidance == one_batch, "{saved:?}");
        // A prediction that may end early is no batch.
        request.step_cache = Some(StepCache::new(0.1).unwrap());
        assert_eq!(placed(&request, room(true, None, Some(one_batch))).0, alone);
    }
}
