//! Pictures between the layers of an autoencoder, laid out as the device computes with them.

use candle_core::{Result, Tensor};

use super::{
    PackedConv2d, channel_rms_norm, channel_rms_norm_silu,
    cuda::{Pixels, Shortcut, StoredKernel},
    upsample_nearest_2x,
};

/// `[b, c, h, w]`. In bf16 on a GPU the channels of a pixel lie side by side, so that a convolution
/// is a product whose rows are pixels; elsewhere each channel is a plane.
#[derive(Debug, Clone)]
pub struct Picture(pub(super) Layout);

#[derive(Debug, Clone)]
pub(super) enum Layout {
    /// `[b, c, h, w]`.
    Planes(Tensor),
    /// `[b, h, w, c]`.
    Pixels(Pixels),
}

impl From<Pixels> for Picture {
    fn from(pixels: Pixels) -> Self {
        Self(Layout::Pixels(pixels))
    }
}

impl Picture {
    /// From `[b, c, h, w]`.
    ///
    /// # Errors
    /// A tensor of another rank, or a failure of the device.
    pub fn new(planes: Tensor) -> Result<Self> {
        Ok(match Pixels::of_planes(&planes)? {
            Some(pixels) => pixels.into(),
            None => Self(Layout::Planes(planes)),
        })
    }

    /// `[b, c, h, w]`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn into_planes(self) -> Result<Tensor> {
        match self.0 {
            Layout::Planes(planes) => Ok(planes),
            Layout::Pixels(pixels) => pixels.to_planes(),
        }
    }

    /// `[b, h · w, c]`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn into_tokens(self) -> Result<Tensor> {
        match self.0 {
            Layout::Planes(planes) => planes.flatten_from(2)?.transpose(1, 2)?.contiguous(), // (b, h·w, c)
            Layout::Pixels(pixels) => pixels.tokens(),
        }
    }

    /// The sum with `tokens: [b, h · w, c]`.
    ///
    /// # Errors
    /// Tokens of another shape, or a failure of the device.
    pub fn add_tokens(self, tokens: &Tensor) -> Result<Self> {
        match self.0 {
            Layout::Planes(x) => {
                let planes = tokens.transpose(1, 2)?.reshape(x.shape())?; // (b, c, h, w)
                Ok(Self(Layout::Planes((x + planes)?)))
            }
            Layout::Pixels(pixels) => pixels.add_tokens(tokens).map(Self::from),
        }
    }

    /// [`channel_rms_norm`]; `gamma: [c]`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn rms_norm(&self, gamma: &Tensor) -> Result<Self> {
        self.normed(gamma, false)
    }

    /// [`channel_rms_norm_silu`]; `gamma: [c]`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn rms_norm_silu(&self, gamma: &Tensor) -> Result<Self> {
        self.normed(gamma, true)
    }

    fn normed(&self, gamma: &Tensor, silu: bool) -> Result<Self> {
        let norm = if silu { channel_rms_norm_silu } else { channel_rms_norm };
        match &self.0 {
            Layout::Planes(planes) => Ok(Self(Layout::Planes(norm(planes, gamma)?))),
            Layout::Pixels(pixels) => match pixels.rms_norm(gamma, silu)? {
                Some(normed) => Ok(normed.into()),
                None => Self::new(norm(&pixels.to_planes()?, gamma)?),
            },
        }
    }
}

impl PackedConv2d {
    /// [`Self::forward`] of a picture.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn apply(&self, x: &Picture) -> Result<Picture> {
        match (&x.0, self.stored()) {
            (Layout::Planes(planes), _) => Ok(Picture(Layout::Planes(self.forward(planes)?))),
            (Layout::Pixels(pixels), Some(kernel)) => {
                Ok(kernel.forward(pixels, (self.shape(), false), None)?.into())
            }
            (Layout::Pixels(pixels), None) => Picture::new(self.forward(&pixels.to_planes()?)?),
        }
    }

    /// [`Self::apply`] after [`upsample_nearest_2x`], which a GPU does not store.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn apply_enlarged(&self, x: Picture) -> Result<Picture> {
        if let (Layout::Pixels(pixels), Some(kernel)) = (&x.0, self.stored()) {
            return Ok(kernel.forward(pixels, (self.shape(), true), None)?.into());
        }
        let small = x.into_planes()?;
        let large = upsample_nearest_2x(&small)?;
        drop(small);
        self.apply(&Picture::new(large)?)
    }
}

/// A convolution, the norm of its result over the channels, and SiLU.
#[derive(Debug, Clone)]
pub struct NormedConv2d {
    conv: PackedConv2d,
    gamma: Tensor,
    /// All three as one product.
    joined: Option<Box<StoredKernel>>,
}

impl NormedConv2d {
    /// [`Picture::rms_norm_silu`] with `gamma: [out]` after `conv`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn new(conv: PackedConv2d, gamma: Tensor) -> Result<Self> {
        let joined = conv.stored().map(|kernel| kernel.with_norm(&gamma)).transpose()?;
        Ok(Self { conv, gamma, joined: joined.map(Box::new) })
    }

    /// `[b, in, h, w]` → `[b, out, h', w']`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn apply(&self, x: Picture) -> Result<Picture> {
        if let (Layout::Pixels(x), Some(kernel)) = (&x.0, &self.joined)
            && kernel.can_norm(x)
        {
            return Ok(kernel.forward(x, (self.conv.shape(), false), None)?.into());
        }
        let y = self.conv.apply(&x)?;
        drop(x);
        y.rms_norm_silu(&self.gamma)
    }
}

/// A convolution beside a shortcut: the end of a residual block.
#[derive(Debug, Clone)]
pub struct ResidualConv2d {
    conv: PackedConv2d,
    shortcut: Option<PackedConv2d>,
    /// Both as one product: the convolution with the sum of the biases, and the shortcut's matrix.
    joined: Option<Box<[StoredKernel; 2]>>,
}

impl ResidualConv2d {
    /// `conv(x) + shortcut(beside)`; without a shortcut, `conv(x) + beside`.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn new(conv: PackedConv2d, shortcut: Option<PackedConv2d>) -> Result<Self> {
        let matrix = match (conv.stored(), &shortcut) {
            (Some(kernel), None) => kernel.identity()?,
            (_, Some(shortcut)) => shortcut.stored().cloned(),
            (None, None) => None,
        };
        let joined = match (conv.stored(), matrix) {
            (Some(kernel), Some(matrix)) => Some(Box::new([kernel.with_bias_of(&matrix)?, matrix])),
            _ => None,
        };
        Ok(Self { conv, shortcut, joined })
    }

    /// `x: [b, in, h, w]`, `beside: [b, beside, h', w']` → `[b, out, h', w']`.
    ///
    /// # Errors
    /// Another number of channels, or a failure of the device.
    pub fn apply(&self, x: Picture, beside: Picture) -> Result<Picture> {
        if let (Layout::Pixels(x), Layout::Pixels(picture), Some(joined)) =
            (&x.0, &beside.0, &self.joined)
        {
            let [conv, kernel] = joined.as_ref();
            let shortcut = Shortcut { picture, kernel };
            return Ok(conv.forward(x, (self.conv.shape(), false), Some(shortcut))?.into());
        }
        let y = self.conv.apply(&x)?.into_planes()?;
        drop(x);
        let sum = match &self.shortcut {
            Some(shortcut) => shortcut.apply(&beside)?.into_planes()? + y,
            None => beside.into_planes()? + y,
        };
        Picture::new(sum?)
    }
}
