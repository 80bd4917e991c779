//! Qwen2.5-VL: reads pictures and text, and writes text.
