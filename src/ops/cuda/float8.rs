//! Activations in numbers of eight bits: `kernels/linear.cu`.

use std::cell::OnceCell;

use candle_core::{DType, Result, Tensor};

use super::{
    ffi::{Output, launch},
    launch::{Args, Launch},
    takes,
};

/// A product's activations, which are rounded to fp8 once for all matrices that want them so.
pub(in crate::ops) struct Activations<'a> {
    x: &'a Tensor,
    rounded: OnceCell<(Tensor, Tensor)>,
}

impl<'a> Activations<'a> {
    /// `x: [.., depth]`.
    pub(in crate::ops) fn new(x: &'a Tensor) -> Self {
        Self { x, rounded: OnceCell::new() }
    }

    /// As they are.
    pub(in crate::ops) fn tensor(&self) -> &'a Tensor {
        self.x
    }

    /// [`float8_rows`] of them, computed when it is first asked for.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "for products by the library"))]
    pub(super) fn rounded(&self) -> Result<Option<&(Tensor, Tensor)>> {
        if self.rounded.get().is_none()
            && let Some(rounded) = float8_rows(self.x)?
        {
            _ = self.rounded.set(rounded);
        }
        Ok(self.rounded.get())
    }
}

/// [`crate::ops::float8_rows`], or `None` where there is no kernel for the type and width.
pub(in crate::ops) fn float8_rows(x: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
    const WARP: usize = 32;
    const THREADS_MAX: usize = 256;
    /// Numbers that a thread moves at once.
    const CHUNK: usize = 8;
    let depth = x.dims().last().copied().unwrap_or(0);
    if !takes(&[x]) || x.elem_count() == 0 || !depth.is_multiple_of(CHUNK) {
        return Ok(None);
    }
    let x = super::tensors::aligned(x)?;
    let rows = x.elem_count().checked_div(depth).unwrap_or(0);
    let bytes = Output::new(x.device(), &[rows, depth], DType::U8)?;
    let scales = Output::new(x.device(), &[rows], DType::F32)?;
    let mut args = Args::default();
    args.tensor(Some(&x))?.address(bytes.address()).address(scales.address());
    args.counts([rows, depth]);
    // Threads that hold the row with so many chunks each.
    let threads = |chunks: usize| depth.div_ceil(CHUNK * chunks).next_multiple_of(WARP);
    let (kernel, threads) = match (threads(3), threads(6)) {
        (threads, _) if threads <= THREADS_MAX => ("float8_rows_3", threads),
        (_, threads) if threads <= THREADS_MAX => ("float8_rows_6", threads),
        _ => ("float8_rows", THREADS_MAX),
    };
    let shared_bytes = threads.div_ceil(WARP) * DType::F32.size_in_bytes();
    let grid = [rows, 1, 1];
    launch(x.device(), &Launch { kernel: kernel.to_owned(), grid, threads, shared_bytes, args })?;
    Ok(Some((bytes.into_tensor()?, scales.into_tensor()?)))
}
