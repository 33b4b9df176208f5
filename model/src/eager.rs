//! The interpreter that trains: every operation runs at once in libtorch.

use tch::{Kind, TchError, Tensor};

use crate::ops::{LAYER_NORM_EPS, MASKED_SCORE, Ops, Size};

/// Runs blocks on libtorch tensors; holds no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct Eager;

/// Up to this many tokens, attention as three batched operations takes less time than libtorch's fused one, which is made
/// for long sequences: half of it for ten tokens, about the same for thirty.
const FEW_TOKENS: i64 = 32;

type Result<T> = std::result::Result<T, TchError>;

impl Ops for Eager {
    type Value = Tensor;
    type Error = TchError;

    fn share(&self, x: &Tensor) -> Tensor {
        x.shallow_clone()
    }

    fn embedding(&mut self, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        Tensor::f_embedding(table, ids, -1, false, false)
    }

    fn linear(&mut self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        // Weights are [in, out] as in ONNX; libtorch wants [out, in], and takes the transposed view without a copy.
        x.f_linear(&weight.f_transpose(0, 1)?, bias)
    }

    fn conv2d(&mut self, x: &Tensor, weight: &Tensor, bias: &Tensor, stride: i64, padding: i64) -> Result<Tensor> {
        // Channels last in memory, in the same logical order: a first convolution takes a quarter of the time so.
        let x = x.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?;
        x.f_conv2d(weight, Some(bias), [stride, stride], [padding, padding], [1, 1], 1)
    }

    fn layer_norm(&mut self, x: &Tensor, gain: &Tensor, bias: &Tensor) -> Result<Tensor> {
        x.f_layer_norm(gain.size(), Some(gain), Some(bias), LAYER_NORM_EPS, true)
    }

    fn gelu(&mut self, x: &Tensor) -> Result<Tensor> {
        x.f_gelu("tanh")
    }

    fn attention(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, keep: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        let bias = match keep {
            // [B, T] of ones and zeros to [B, 1, 1, T] of zeros and very negative scores.
            Some(keep) => {
                let dropped = keep.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?.f_mul_scalar(f64::from(MASKED_SCORE))?;
                Some(dropped.f_unsqueeze(1)?.f_unsqueeze(1)?)
            }
            None => None,
        };
        if k.size()[2] <= FEW_TOKENS {
            attention_in_batches(q, k, v, bias.as_ref(), scale)
        } else {
            Tensor::f_scaled_dot_product_attention(q, k, v, bias, 0.0, false, scale, false)
        }
    }

    fn add(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.f_add(b)
    }

    fn mul(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.f_mul(b)
    }

    fn exp(&mut self, x: &Tensor) -> Result<Tensor> {
        x.f_exp()
    }

    fn reshape(&mut self, x: &Tensor, shape: &[Size]) -> Result<Tensor> {
        let from = x.size();
        let target: Vec<i64> = shape
            .iter()
            .enumerate()
            .map(|(at, size)| match size {
                Size::Same => from[at],
                Size::Fixed(n) => *n,
                Size::Rest => -1,
            })
            .collect();
        x.f_reshape(target)
    }

    fn transpose(&mut self, x: &Tensor, perm: &[i64]) -> Result<Tensor> {
        x.f_permute(perm)
    }

    fn split_last(&mut self, x: &Tensor, parts: usize) -> Result<Vec<Tensor>> {
        x.f_chunk(parts as i64, -1)
    }

    fn concat(&mut self, parts: &[Tensor], dim: i64) -> Result<Tensor> {
        Tensor::f_cat(parts, dim)
    }

    fn gather_rows(&mut self, x: &Tensor, index: &Tensor) -> Result<Tensor> {
        x.f_index_select(0, index)
    }

    fn first_token(&mut self, x: &Tensor) -> Result<Tensor> {
        x.f_select(1, 0)
    }

    fn add_positions(&mut self, x: &Tensor, table: &Tensor) -> Result<Tensor> {
        x.f_add(&table.f_narrow(0, 0, x.size()[1])?)
    }

    fn keep_mask(&mut self, ids: &Tensor) -> Result<Tensor> {
        ids.f_ne(0)?.f_to_kind(Kind::Float)
    }

    fn ones_mask(&mut self, x: &Tensor) -> Result<Tensor> {
        Tensor::f_ones(&x.size()[..2], (Kind::Float, x.device()))
    }

    fn repeat_row(&mut self, row: &Tensor, like: &Tensor) -> Result<Tensor> {
        row.f_reshape([1, 1, -1])?.f_expand([like.size()[0], 1, -1], false)
    }

    fn masked_mean(&mut self, x: &Tensor, keep: &Tensor) -> Result<Tensor> {
        let weights = keep.f_unsqueeze(-1)?;
        let sum = x.f_mul(&weights)?.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?;
        sum.f_div(&weights.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?)
    }

    fn l2_normalise(&mut self, x: &Tensor) -> Result<Tensor> {
        let length = x.f_mul(x)?.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?.f_sqrt()?;
        x.f_div(&length)
    }
}

/// `bias` `[B, 1, 1, T]` is added to the scores.
fn attention_in_batches(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let size = q.size();
    let (batch, heads, queries, tokens) = (size[0], size[1], size[2], k.size()[2]);
    let flat = |x: &Tensor| x.f_reshape([batch * heads, -1, size[3]]);
    let bias = match bias {
        Some(bias) => bias.f_expand([batch, heads, 1, tokens], false)?.f_reshape([batch * heads, 1, tokens])?,
        None => Tensor::f_zeros([1, 1, 1], (q.kind(), q.device()))?,
    };
    let scores = bias.f_baddbmm(&flat(q)?, &flat(k)?.f_transpose(1, 2)?, 1.0, scale)?;
    let mixed = scores.f_softmax(-1, None)?.f_bmm(&flat(v)?)?;
    mixed.f_view([batch, heads, queries, size[3]])
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn both_ways_to_attend_agree() {
        let random = |tokens| Tensor::randn([3, 2, tokens, 4], (Kind::Float, Device::Cpu));
        let tokens = FEW_TOKENS + 3;
        let (q, k, v) = (random(5), random(tokens), random(tokens));
        let keep = Tensor::ones([3, tokens], (Kind::Float, Device::Cpu));
        let _ = keep.get(1).narrow(0, 2, tokens - 2).fill_(0.0);
        let fused = Eager.attention(&q, &k, &v, Some(&keep), 0.5).unwrap();
        let hidden: Tensor = 1.0 - &keep;
        let bias = (hidden * f64::from(MASKED_SCORE)).unsqueeze(1).unsqueeze(1);
        let batched = attention_in_batches(&q, &k, &v, Some(&bias), 0.5).unwrap();
        assert!((fused - batched).abs().max().double_value(&[]) < 1e-5);
        let fused = Eager.attention(&q, &k, &v, None, 0.5).unwrap();
        let batched = attention_in_batches(&q, &k, &v, None, 0.5).unwrap();
        assert!((fused - batched).abs().max().double_value(&[]) < 1e-5);
    }
}
