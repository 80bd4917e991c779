//! Tests of diffusion.
