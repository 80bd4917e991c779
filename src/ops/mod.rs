//! The operations that models are made of. Each has one signature and gives the same numbers on
//! every device; tensors are float32 unless a function says otherwise.

pub mod activation;
pub mod attention;
mod buffers;
pub mod conv;
mod cpu;
pub mod cuda;
mod direct;
mod flash;
pub mod float8;
pub mod fused;
pub mod joint;
pub mod linear;
mod matrix;
pub mod norm;
pub mod patches;
pub mod picture;
mod quantize;
pub mod rope;
mod rows;
pub mod sampling;
mod simd;
mod source;
pub mod tensors;
pub mod timestep;

pub use activation::{gelu_erf, gelu_tanh, gelu_tanh_owned, silu, swiglu};
pub use attention::{Mask, attention};
pub use buffers::{KeepBuffers, recycle};
pub use conv::{Conv2dShape, PackedConv2d, Padding, upsample_nearest_2x};
pub use cpu::on_worker;
pub use float8::float8_rows;
pub use fused::{
    GatedTokens, ModulatedTokens, gated_add_each, gated_add_norm_each, gated_add_norm_streams,
    gated_add_streams, linear_gated_add, modulated_layer_norm_each, modulated_layer_norm_streams,
    modulated_linear_each, modulated_linear_gelu,
};
pub use joint::{
    JointOutput, JointShape, JointStream, TextLengths, joint_attention, joint_attention_bf16,
};
pub use linear::{LinearWeight, PackedLinear, forward_each};
pub use matrix::{Float8, PackedMatrix};
pub use norm::{
    channel_rms_norm, channel_rms_norm_silu, gated_add, gated_add_norm, layer_norm,
    modulated_layer_norm, rms_norm,
};
pub use patches::{pack_patches, unpack_patches};
pub use picture::{NormedConv2d, Picture, ResidualConv2d};
pub use rope::{rotate_halves, rotate_pairs};
pub use sampling::{guided_step, rescaled_guidance};
pub use simd::blocks::{BlockFormat, PackedBlocks};
pub use source::{Kept, MatrixBytes, Numbers};
pub use tensors::{Combination, add, clamp, combine, laid_out, row_sizes, take_rows};
pub use timestep::{Sinusoids, timestep_embedding};
