//! What `--dry-run` prints: memory, stage by stage.

use pentimento::{
    MemoryPlan, Result,
    diffusion::{GuidancePass, Residency},
};
use serde_json::json;

/// Prints a plan of memory as a table or as JSON.
pub(crate) fn print(plan: &MemoryPlan, as_json: bool) -> Result<()> {
    if as_json {
        return super::print_json(&json!({
            "version": 1,
            "fits": plan.fits(),
            "memory": plan,
        }));
    }
    super::print(table(plan).as_bytes())
}

fn table(plan: &MemoryPlan) -> String {
    let row = |name: &str, weights: u64, activations: u64| {
        let (weights, activations, both) =
            (gib(weights), gib(activations), gib(weights + activations));
        format!("{name:<22}{weights:>10}{activations:>14}{both:>10}\n")
    };
    let mut text =
        format!("{:<22}{:>10}{:>14}{:>10}   GiB\n", "", "weights", "activations", "in use");
    for stage in &plan.stages {
        text += &row(stage.stage.label(), stage.weights_bytes, stage.activation_bytes);
    }
    let placement = plan.placement;
    let encoder = if placement.take_turns { "takes turns with the transformer" } else { "stays" };
    text += &format!("vision-language model {encoder}\n");
    text += &match placement.transformer {
        Residency::Resident => "transformer           stays\n".to_owned(),
        Residency::Streamed { blocks } => {
            format!("transformer           {blocks} blocks stay, the others are streamed\n")
        }
    };
    if placement.guidance == GuidancePass::OneBatch {
        text += "guidance              both predictions in one batch\n";
    }
    if let Some(tile_px) = placement.tile_px {
        text += &format!("autoencoder           in tiles of {tile_px} pixels\n");
    }
    text += &format!("most in use           {:>10}\n", gib(plan.peak_bytes));
    if let Some(available) = plan.available_bytes {
        text += &format!("may be used           {:>10}\n", gib(available));
    }
    if let Some(hint) = &plan.hint {
        text += &format!("does not fit; what would: {hint}\n");
    }
    text
}

/// Bytes in GiB with three places.
fn gib(bytes: u64) -> String {
    const BYTES_PER_GIB: f64 = 1_073_741_824.0;
    #[expect(clippy::cast_precision_loss, reason = "shown with three places")]
    let gib = bytes as f64 / BYTES_PER_GIB;
    format!("{gib:.3}")
}
