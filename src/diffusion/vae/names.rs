//! The two spellings of the autoencoder's tensor names, and its dimensions from its tensors.
//!
//! The order of Wan's flat lists follows `convert_wan_vae_to_diffusers` in
//! <https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/loaders/single_file_utils.py#L3363-L3460>.

use serde_json::{Value as Json, json};

use super::config::CLASS;
use crate::{
    error::{ModelError, Result},
    weights::Checkpoint,
};

/// Only Wan's spelling has this name.
const WAN_SIGN: &str = "decoder.middle.0.residual.0.gamma";
/// Names at the top, and at the top of encoder and decoder.
const WAN_TOP: &[(&str, &str)] = &[("conv1", "quant_conv"), ("conv2", "post_quant_conv")];
const WAN_HALF: &[(&str, &str)] = &[
    ("conv1", "conv_in"),
    ("head.0", "norm_out"),
    ("head.2", "conv_out"),
    ("middle.0", "mid_block.resnets.0"),
    ("middle.1", "mid_block.attentions.0"),
    ("middle.2", "mid_block.resnets.1"),
];
/// Names inside a residual block.
const WAN_BLOCK: &[(&str, &str)] = &[
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
];

/// A checkpoint under the names of the published folder.
///
/// # Errors
/// Two tensors of one name.
pub(crate) fn canonical(checkpoint: Checkpoint) -> Result<Checkpoint> {
    if !checkpoint.contains(WAN_SIGN) {
        return Ok(checkpoint);
    }
    // The decoder's levels stand one after the other; each but the last ends with an enlargement.
    let enlarges = |index: &usize| {
        checkpoint.contains(&format!("decoder.upsamples.{index}.resample.1.weight"))
    };
    let level_end = (0..checkpoint.tensors().count()).find(enlarges).unwrap_or(usize::MAX - 1);
    checkpoint.rename(|name| canonical_name(name, level_end + 1))
}

/// `name` in the published spelling; `level` entries of the decoder's list make one level.
fn canonical_name(name: &str, level: usize) -> String {
    let half = ["encoder", "decoder"]
        .iter()
        .find_map(|half| Some((*half, name.strip_prefix(half)?.strip_prefix('.')?)));
    let Some((half, rest)) = half else { return replaced(name, WAN_TOP) };
    let rest = replaced(rest, WAN_HALF);
    let rest = match listed(&rest, "downsamples.") {
        Some((index, tail)) => format!("down_blocks.{index}.{tail}"),
        None => rest,
    };
    let rest = match listed(&rest, "upsamples.") {
        Some((index, tail)) => up_block(index, tail, level),
        None => rest,
    };
    for (wan, ours) in WAN_BLOCK {
        if let Some((place, end)) = rest.split_once(&format!(".{wan}.")) {
            return format!("{half}.{place}.{ours}.{end}");
        }
    }
    format!("{half}.{rest}")
}

/// `name` with its start replaced.
fn replaced(name: &str, starts: &[(&str, &str)]) -> String {
    let tail = |start: &str| name.strip_prefix(start)?.strip_prefix('.');
    let new = starts.iter().find_map(|(wan, ours)| Some(format!("{ours}.{}", tail(wan)?)));
    new.unwrap_or_else(|| name.to_owned())
}

/// Index and tail of `list` + index + `.` + tail.
fn listed<'a>(name: &'a str, list: &str) -> Option<(usize, &'a str)> {
    let (index, tail) = name.strip_prefix(list)?.split_once('.')?;
    Some((index.parse().ok()?, tail))
}

fn up_block(index: usize, tail: &str, level: usize) -> String {
    let block = index.checked_div(level).unwrap_or(0);
    match index.checked_rem(level).unwrap_or(0) {
        last if last + 1 == level => format!("up_blocks.{block}.upsamplers.0.{tail}"),
        resnet => format!("up_blocks.{block}.resnets.{resnet}.{tail}"),
    }
}

/// `config.json` of the dimensions that the tensors have; statistics of latents are the published
/// ones.
///
/// # Errors
/// A tensor that is missing: the file is of another model.
pub(crate) fn config(checkpoint: &Checkpoint) -> Result<Json> {
    let rows = |tensor: &str| checkpoint.shape(tensor).and_then(|shape| shape.first().copied());
    let needed = |tensor: &str| {
        rows(tensor).ok_or_else(|| {
            let path = checkpoint.name().to_owned();
            let near = " (the file is no Qwen-Image autoencoder)".to_owned();
            crate::Error::from(ModelError::TensorMissing { path, tensor: tensor.to_owned(), near })
        })
    };
    let base = needed("encoder.conv_in.weight")?;
    needed("encoder.down_blocks.0.conv1.weight")?; // others call it resnets.0.conv1
    let (mut mults, mut halves_time) = (Vec::new(), Vec::new());
    let (mut blocks, mut blocks_of_first, mut width) = (0, None, base);
    for index in 0..checkpoint.tensors().count() {
        let place = format!("encoder.down_blocks.{index}");
        if let Some(out) = rows(&format!("{place}.conv1.weight")) {
            (blocks, width) = (blocks + 1, out);
        } else if rows(&format!("{place}.resample.1.weight")).is_some() {
            mults.push(width.checked_div(base).unwrap_or(0));
            halves_time.push(checkpoint.contains(&format!("{place}.time_conv.weight")));
            blocks_of_first.get_or_insert(blocks);
        } else {
            break;
        }
    }
    mults.push(width.checked_div(base).unwrap_or(0));
    Ok(json!({
        "_class_name": CLASS,
        "base_dim": base,
        "z_dim": needed("post_quant_conv.weight")?,
        "dim_mult": mults,
        "num_res_blocks": blocks_of_first.unwrap_or(blocks),
        "temperal_downsample": halves_time,
    }))
}

#[cfg(test)]
mod tests {
    use super::canonical_name;

    #[test]
    fn names_follow_the_reference() {
        const LEVEL: usize = 4; // two residual blocks and one more, then the enlargement
        for (wan, ours) in [
            ("conv1.weight", "quant_conv.weight"),
            ("conv2.bias", "post_quant_conv.bias"),
            ("encoder.conv1.weight", "encoder.conv_in.weight"),
            ("encoder.downsamples.3.residual.6.bias", "encoder.down_blocks.3.conv2.bias"),
            ("encoder.downsamples.3.shortcut.weight", "encoder.down_blocks.3.conv_shortcut.weight"),
            ("encoder.downsamples.5.time_conv.bias", "encoder.down_blocks.5.time_conv.bias"),
            ("encoder.middle.1.to_qkv.weight", "encoder.mid_block.attentions.0.to_qkv.weight"),
            ("decoder.middle.2.residual.3.gamma", "decoder.mid_block.resnets.1.norm2.gamma"),
            ("decoder.upsamples.2.residual.0.gamma", "decoder.up_blocks.0.resnets.2.norm1.gamma"),
            (
                "decoder.upsamples.3.resample.1.weight",
                "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
            ),
            (
                "decoder.upsamples.4.shortcut.weight",
                "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
            ),
            (
                "decoder.upsamples.14.residual.2.weight",
                "decoder.up_blocks.3.resnets.2.conv1.weight",
            ),
            ("decoder.head.0.gamma", "decoder.norm_out.gamma"),
            ("decoder.head.2.weight", "decoder.conv_out.weight"),
        ] {
            assert_eq!(canonical_name(wan, LEVEL), ours);
        }
    }
}
