//! The operations a network may use; each interpreter implements them all.

/// One dimension of the target of [`Ops::reshape`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// The input's dimension at the same position, whatever it is at run time.
    Same,
    /// Exactly this many.
    Fixed(i64),
    /// What is left; at most once in a target.
    Rest,
}

/// What a block computes with.
///
/// `Value` is a tensor or the name of one. Shapes use these letters: `B` batch, `T` tokens,
/// `D` width, `H` heads, `K` width of a head. Floats are f32, ids and indices i64.
pub trait Ops {
    /// A tensor of this interpreter.
    type Value;
    /// Why an operation failed.
    type Error;

    /// The same value once more; copies no data.
    fn share(&self, x: &Self::Value) -> Self::Value;
    /// Rows of `table` `[V, D]` for `ids` `[B, T]`: `[B, T, D]`.
    fn embedding(&mut self, table: &Self::Value, ids: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// `x` `[.., I]` times `weight` `[I, O]`, plus `bias` `[O]`.
    fn linear(
        &mut self,
        x: &Self::Value,
        weight: &Self::Value,
        bias: Option<&Self::Value>,
    ) -> Result<Self::Value, Self::Error>;
    /// 2-D convolution of `x` `[B, I, H, W]` with a square kernel `weight` `[O, I, k, k]` and `bias` `[O]`.
    fn conv2d(
        &mut self,
        x: &Self::Value,
        weight: &Self::Value,
        bias: &Self::Value,
        stride: i64,
        padding: i64,
    ) -> Result<Self::Value, Self::Error>;
    /// Normalises the last dimension of `x`, then scales by `gain` and shifts by `bias`; epsilon is 1e-5.
    fn layer_norm(
        &mut self,
        x: &Self::Value,
        gain: &Self::Value,
        bias: &Self::Value,
    ) -> Result<Self::Value, Self::Error>;
    /// GELU by its tanh approximation (Hendrycks & Gimpel 2016).
    fn gelu(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// `softmax(scale q k^T + mask) v` for `k`, `v` `[B, H, T, K]` and as many queries `q` as are asked for; positions
    /// where `keep` `[B, T]` is zero are never attended to.
    fn attention(
        &mut self,
        q: &Self::Value,
        k: &Self::Value,
        v: &Self::Value,
        keep: Option<&Self::Value>,
        scale: f64,
    ) -> Result<Self::Value, Self::Error>;
    /// Elementwise sum, broadcast as NumPy does.
    fn add(&mut self, a: &Self::Value, b: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Elementwise product, broadcast as NumPy does.
    fn mul(&mut self, a: &Self::Value, b: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Elementwise exponential.
    fn exp(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// The same numbers in another shape.
    fn reshape(&mut self, x: &Self::Value, shape: &[Size]) -> Result<Self::Value, Self::Error>;
    /// Dimensions in the order of `perm`.
    fn transpose(&mut self, x: &Self::Value, perm: &[i64]) -> Result<Self::Value, Self::Error>;
    /// `parts` equal pieces of the last dimension.
    fn split_last(&mut self, x: &Self::Value, parts: usize) -> Result<Vec<Self::Value>, Self::Error>;
    /// Tensors joined along `dim`.
    fn concat(&mut self, parts: &[Self::Value], dim: i64) -> Result<Self::Value, Self::Error>;
    /// Rows of `x` (first dimension) chosen by `index` `[N]`.
    fn gather_rows(&mut self, x: &Self::Value, index: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// The first token: `x` `[B, T, D]` to `[B, D]`.
    fn first_token(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// `x` `[B, T, D]` plus the first `T` rows of `table` `[M, D]`, `T <= M`.
    fn add_positions(&mut self, x: &Self::Value, table: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// 1.0 where `ids` `[B, T]` is a token and 0.0 where it is padding (id 0).
    fn keep_mask(&mut self, ids: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Ones `[B, T]` for `x` `[B, T, D]`.
    fn ones_mask(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// `row` `[D]` once per batch row of `like` `[B, ..]`: `[B, 1, D]`.
    fn repeat_row(&mut self, row: &Self::Value, like: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Mean over the tokens of `x` `[B, T, D]` whose `keep` `[B, T]` is one: `[B, D]`.
    fn masked_mean(&mut self, x: &Self::Value, keep: &Self::Value) -> Result<Self::Value, Self::Error>;
    /// Rows of `x` `[B, D]` scaled to length one.
    fn l2_normalise(&mut self, x: &Self::Value) -> Result<Self::Value, Self::Error>;
}

/// Added to the variance before its root, in every interpreter.
pub(crate) const LAYER_NORM_EPS: f64 = 1e-5;

/// Added to attention scores of padding: large enough to vanish in the softmax, small enough not to overflow.
pub(crate) const MASKED_SCORE: f32 = -1e9;
