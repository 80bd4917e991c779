//! Measuring: the miniature world with its exact targets and strict readout.

pub mod scenes;
