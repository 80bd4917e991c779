//! Keys and values of the tokens that the language model has seen.

use candle_core::{Result, Tensor};

/// The axis of the tokens in `[1, n, heads, d]`.
const TOKEN_AXIS: usize = 1;

/// One sequence's keys and values in every layer. It is filled in place, so it has no `Clone`.
#[derive(Debug)]
pub(super) struct Cache {
    layers: Vec<Layer>,
    /// Tokens that are made room for at a time.
    step: usize,
}

/// Room for the keys and values of one layer, of which the first tokens' are filled.
#[derive(Debug, Default)]
struct Layer {
    /// `[1, capacity, kv_heads, d]`; `None` before the first tokens.
    room: Option<[Tensor; 2]>,
    len: usize,
}

impl Cache {
    /// An empty cache for `layers` layers, with room for `tokens` tokens; it grows by as many when
    /// they are used up.
    pub(super) fn new(layers: usize, tokens: usize) -> Self {
        let layers = (0..layers).map(|_| Layer::default()).collect();
        Self { layers, step: tokens.max(1) }
    }

    /// Tokens seen so far.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Tokens that there is room for.
    #[must_use]
    pub(super) fn capacity(&self) -> usize {
        let room = self.layers.first().and_then(|layer| layer.room.as_ref());
        room.map_or(0, |[keys, _]| keys.dims()[TOKEN_AXIS])
    }

    /// Appends new tokens' keys and values `[1, n, kv_heads, d]` in one layer; returns those of all
    /// tokens so far, `[1, len, kv_heads, d]`.
    pub(super) fn append(
        &mut self,
        layer: usize,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let step = self.step;
        let layer = &mut self.layers[layer];
        let (start, end) = (layer.len, layer.len + key.dim(TOKEN_AXIS)?);
        layer.len = end;
        let [keys, values] = layer.with_room((start, end), step, [key, value])?;
        for (room, new) in [(keys, key), (values, value)] {
            room.slice_set(&new.contiguous()?, TOKEN_AXIS, start)?;
        }
        let seen = |room: &Tensor| room.narrow(TOKEN_AXIS, 0, end);
        Ok((seen(keys)?, seen(values)?))
    }

    /// Makes room for one more token. `false` where the cache is empty.
    pub(super) fn reserve(&mut self) -> Result<bool> {
        for layer in &mut self.layers {
            let Some(room) = layer.room.clone() else { return Ok(false) };
            layer.with_room((layer.len, layer.len + 1), self.step, room.each_ref())?;
        }
        Ok(!self.layers.is_empty())
    }

    /// Room for keys and values of each layer, `[1, capacity, kv_heads, d]`.
    pub(super) fn rooms(&self) -> impl Iterator<Item = [&Tensor; 2]> {
        self.layers.iter().filter_map(|layer| layer.room.as_ref().map(<[Tensor; 2]>::each_ref))
    }

    /// Counts a token whose keys and values were put in their place in every layer.
    pub(super) fn count_one(&mut self) {
        for layer in &mut self.layers {
            layer.len += 1;
        }
    }
}

impl Layer {
    /// Room for `tokens` tokens of keys and values like these, of which `filled` are there.
    fn with_room(
        &mut self,
        (filled, tokens): (usize, usize),
        step: usize,
        like: [&Tensor; 2],
    ) -> Result<&[Tensor; 2]> {
        let capacity = |room: &[Tensor; 2]| room[0].dims()[TOKEN_AXIS];
        let room = match self.room.take() {
            Some(room) if capacity(&room) >= tokens => room,
            room => {
                let capacity = tokens.div_ceil(step) * step;
                let more = |i: usize| -> Result<Tensor> {
                    let mut dims = like[i].dims().to_vec();
                    dims[TOKEN_AXIS] = capacity;
                    let all = Tensor::zeros(dims, like[i].dtype(), like[i].device())?;
                    if let Some(room) = room.as_ref().filter(|_| filled > 0) {
                        let filled = room[i].narrow(TOKEN_AXIS, 0, filled)?.contiguous()?;
                        all.slice_set(&filled, TOKEN_AXIS, 0)?;
                    }
                    Ok(all)
                };
                [more(0)?, more(1)?]
            }
        };
        Ok(self.room.insert(room))
    }
}
