//! How LoRA files spell the names of modules and of what belongs to them.

use std::collections::BTreeMap;

use crate::weights::Checkpoint;

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    /// `[rank, width_in]`.
    Down,
    /// `[width_out, rank]`.
    Up,
    /// One number that the change is multiplied by, over the rank.
    Alpha,
}

/// What a tensor's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reading<'a> {
    /// A part of a module's change.
    Part { module: &'a str, role: Role },
    /// A change of the text encoder.
    TextEncoder,
    /// Something else, in words.
    Other(&'static str),
}

/// Ends of names. The first that fits counts.
const ENDS: &[(&str, Role)] = &[
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".alpha", Role::Alpha),
];
/// Ends before the name of an adapter: `.lora_A.<adapter>.weight`.
const NAMED_ENDS: &[(&str, Role)] = &[(".lora_A", Role::Down), (".lora_B", Role::Up)];
/// What programs put before the names of modules, also one after the other.
const PREFIXES: &[&str] = &[
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
];
/// Where text encoders are.
const TEXT_ENCODERS: &[&str] =
    &["lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.", "text_encoders."];
/// Pieces of names of other kinds of changes.
const OTHERS: &[(&str, &str)] = &[
    (".hada_", "a Hadamard product (LoHa)"),
    (".lokr_", "a Kronecker product (LoKr)"),
    (".oft_", "an orthogonal change (OFT)"),
    (".boft_", "an orthogonal change (BOFT)"),
    (".dora_scale", "magnitudes of columns (DoRA)"),
    (".lora_magnitude_vector", "magnitudes of columns (DoRA)"),
    (".lora_mid", "the core of a Tucker product"),
    (".lora_B.bias", "the bias of a factor"),
    (".lora_up.bias", "the bias of a factor"),
    (".diff_b", "a change of a bias"),
    (".set_weight", "a weight to be replaced"),
    (".reshape_weight", "a weight of another shape"),
    (".w_norm", "a change of a norm"),
    (".b_norm", "a change of a norm"),
];
/// Ends of names of other kinds of changes.
const OTHER_ENDS: &[(&str, &str)] = &[
    (".diff", "a change of full rank"),
    (".scale", "a scale of its own"),
    (".a1.weight", "a factor of a GLoRA"),
    (".a2.weight", "a factor of a GLoRA"),
    (".b1.weight", "a factor of a GLoRA"),
    (".b2.weight", "a factor of a GLoRA"),
];
/// Pieces of modules' names, and what has such modules.
const FOREIGN: &[(&str, &str)] = &[
    ("double_blocks", "they are FLUX's"),
    ("single_blocks", "they are FLUX's"),
    ("single_transformer_blocks", "they are FLUX's"),
    ("qkv", "they are fused projections, which this model does not have"),
    ("down_blocks", "they are a U-Net's"),
    ("input_blocks", "they are a U-Net's"),
    ("joint_blocks", "they are Stable Diffusion 3's"),
    ("self_attn", "they are a language or video model's"),
];

/// Reads the name of a tensor.
pub(super) fn read(name: &str) -> Reading<'_> {
    if stages(name).any(|rest| TEXT_ENCODERS.iter().any(|start| rest.starts_with(start))) {
        return Reading::TextEncoder;
    }
    if let Some((_, what)) = OTHERS.iter().find(|(piece, _)| name.contains(piece)) {
        return Reading::Other(what);
    }
    if let Some((module, role)) = ended(name, ENDS).or_else(|| named(name)) {
        return Reading::Part { module, role };
    }
    let other = OTHER_ENDS.iter().find(|(end, _)| name.ends_with(end));
    Reading::Other(other.map_or("which is no part of a low-rank change", |(_, what)| what))
}

/// What has modules of such a name.
pub(super) fn foreign(module: &str) -> Option<&'static str> {
    FOREIGN.iter().find(|(piece, _)| module.contains(piece)).map(|(_, what)| *what)
}

fn ended<'a>(name: &'a str, ends: &[(&str, Role)]) -> Option<(&'a str, Role)> {
    ends.iter().find_map(|(end, role)| Some((name.strip_suffix(end)?, *role)))
}

/// The parts of `<module>.lora_A.<adapter>.weight`.
fn named(name: &str) -> Option<(&str, Role)> {
    let (stem, adapter) = name.strip_suffix(".weight")?.rsplit_once('.')?;
    ended(stem, NAMED_ENDS).filter(|_| !adapter.is_empty())
}

/// `name`, and what is left of it as prefixes are taken off.
fn stages(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |rest| {
        PREFIXES.iter().find_map(|prefix| rest.strip_prefix(prefix))
    })
}

/// The matrices of a model, found by the names that files give them.
#[derive(Debug)]
pub(super) struct Modules {
    /// `[out, in]` by name.
    widths: BTreeMap<String, [usize; 2]>,
    /// Names by themselves with `_` for `.`; none where several become the same.
    flat: BTreeMap<String, Option<String>>,
}

impl Modules {
    /// Of a checkpoint under the model's own names.
    pub(super) fn of(model: &Checkpoint) -> Self {
        let matrix = |(name, entry): (&str, &crate::weights::TensorEntry)| {
            let widths = <[usize; 2]>::try_from(entry.shape.as_slice()).ok()?;
            Some((name.strip_suffix(".weight")?.to_owned(), widths))
        };
        let widths: BTreeMap<String, [usize; 2]> = model.tensors().filter_map(matrix).collect();
        let mut flat = BTreeMap::new();
        for name in widths.keys() {
            let entry = flat.entry(name.replace('.', "_"));
            entry.and_modify(|taken| *taken = None).or_insert_with(|| Some(name.clone()));
        }
        Self { widths, flat }
    }

    /// Name and widths `[out, in]` of the module that a file calls `name`.
    pub(super) fn find(&self, name: &str) -> Option<(&str, [usize; 2])> {
        let name = name.replace(".processor.", ".");
        let found = stages(&name).find_map(|rest| {
            // Older files leave out that the output projection is the first of a list.
            let listed = |end: &str| rest.ends_with("to_out").then(|| format!("{rest}{end}"));
            let spellings = [Some(rest.to_owned()), listed(".0"), listed("_0")];
            spellings.into_iter().flatten().find_map(|spelling| self.exact(&spelling))
        })?;
        Some((found.0, *found.1))
    }

    fn exact(&self, name: &str) -> Option<(&str, &[usize; 2])> {
        let name =
            if self.widths.contains_key(name) { name } else { self.flat.get(name)?.as_deref()? };
        self.widths.get_key_value(name).map(|(name, widths)| (name.as_str(), widths))
    }

    /// A module's name, for messages.
    pub(super) fn example(&self) -> &str {
        let deep = self.widths.keys().find(|name| name.contains("attn"));
        deep.or_else(|| self.widths.keys().next()).map_or("", String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_told_by_all_their_spellings() {
        for (down, up) in [
            ("m.lora_A.weight", "m.lora_B.weight"),
            ("m.lora_A", "m.lora_B"),
            ("m.lora_A.default_0.weight", "m.lora_B.default_0.weight"),
            ("m.lora_down.weight", "m.lora_up.weight"),
            ("m.lora.down.weight", "m.lora.up.weight"),
            ("m_lora.down.weight", "m_lora.up.weight"),
            ("m.lora_linear_layer.down.weight", "m.lora_linear_layer.up.weight"),
        ] {
            assert_eq!(read(down), Reading::Part { module: "m", role: Role::Down });
            assert_eq!(read(up), Reading::Part { module: "m", role: Role::Up });
        }
        assert_eq!(read("m.alpha"), Reading::Part { module: "m", role: Role::Alpha });
    }

    #[test]
    fn text_encoders_and_other_kinds_are_told() {
        for name in [
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
            "text_encoder.layers.0.q_proj.lora_A.weight",
            "base_model.model.text_encoder.layers.0.hada_w1_a",
        ] {
            assert_eq!(read(name), Reading::TextEncoder, "{name}");
        }
        for (name, word) in [
            ("m.hada_w1_a", "LoHa"),
            ("m.lokr_w2", "LoKr"),
            ("m.dora_scale", "DoRA"),
            ("m.lora_magnitude_vector.weight", "DoRA"),
            ("m.lora_mid.weight", "Tucker"),
            ("m.diff", "full rank"),
            ("m.diff_b", "bias"),
            ("m.a1.weight", "GLoRA"),
            ("m.lora_B.bias", "bias"),
            ("m.weight", "no part"),
            ("m.lora_C.weight", "no part"),
        ] {
            assert!(matches!(read(name), Reading::Other(what) if what.contains(word)), "{name}");
        }
    }

    #[test]
    fn modules_are_found_by_the_models_own_names() {
        let names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"];
        let widths: BTreeMap<_, _> =
            names.iter().map(|name| ((*name).to_owned(), [3, 2])).collect();
        let flat = widths.keys().map(|name| (name.replace('.', "_"), Some(name.clone()))).collect();
        let modules = Modules { widths, flat };
        for (name, found) in [
            ("transformer_blocks.0.attn.to_q", 0),
            ("transformer.transformer_blocks.0.attn.to_q", 0),
            ("model.diffusion_model.transformer_blocks.0.attn.to_q", 0),
            ("unet.base_model.model.transformer_blocks.0.attn.to_q", 0),
            ("base_model.model.transformer.transformer_blocks.0.attn.processor.to_q", 0),
            ("lora_unet_transformer_blocks_0_attn_to_q", 0),
            ("lycoris_transformer_blocks_0_attn_to_out_0", 1),
            ("lora_transformer_transformer_blocks_0_attn_to_out", 1),
            ("transformer_blocks.0.attn.processor.to_out", 1),
        ] {
            assert_eq!(modules.find(name), Some((names[found], [3, 2])), "{name}");
        }
        for name in ["attn.to_q", "transformer_blocks.1.attn.to_q", "lora_unet_", "to_q", ""] {
            assert_eq!(modules.find(name), None, "{name}");
        }
    }
}
