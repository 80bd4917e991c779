//! Pictures as files and as numbers: decoding under limits, sizes, resampling, writing.
