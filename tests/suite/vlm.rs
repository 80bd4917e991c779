//! Tests of vlm.
