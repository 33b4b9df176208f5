//! Differentiation primitives for an executor that keeps autograd inside a block, and fused updates for optimizers.

use tch::Tensor;

use crate::error::DistError;
use crate::ffi;

/// Runs the backward pass from `outputs`, seeded with the gradient of the loss with respect to each of them.
/// Gradients accumulate into the `.grad` of the leaves, and the graph is freed.
///
/// * `outputs[i]` and `gradients[i]` have one shape and kind.
///
/// # Errors
/// [`DistError::Torch`] if the lists differ in length, a shape does not fit, or an output has no graph.
pub fn backward(outputs: &[Tensor], gradients: &[Tensor]) -> Result<(), DistError> {
    if outputs.len() != gradients.len() {
        let cause = format!("{} outputs, but {} gradients", outputs.len(), gradients.len());
        return Err(DistError::Torch { operation: "backward", cause });
    }
    ffi::backward(outputs, gradients).map_err(torch("backward"))
}

/// Makes `gradient` the `.grad` of `leaf`: the same memory, into which later backward passes accumulate in place.
/// So the gradients of many parameters can be views of one flat buffer that is reduced in one operation.
///
/// * `gradient`: shape, kind and device of `leaf`.
///
/// # Errors
/// [`DistError::Torch`] if they differ, or `leaf` is not a leaf that requires a gradient.
pub fn set_grad(leaf: &Tensor, gradient: &Tensor) -> Result<(), DistError> {
    let refuse = |cause: String| Err(DistError::Torch { operation: "set_grad", cause });
    let describe = |tensor: &Tensor| format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
    if !leaf.defined() || !gradient.defined() {
        return refuse("a tensor is undefined".to_owned());
    }
    if describe(leaf) != describe(gradient) {
        return refuse(format!("the leaf is {}, but the gradient is {}", describe(leaf), describe(gradient)));
    }
    if !leaf.requires_grad() || !leaf.is_leaf() {
        return refuse("the tensor is not a leaf that requires a gradient".to_owned());
    }
    ffi::set_grad(leaf, gradient).map_err(torch("set_grad"))
}

/// `tensor += value * a * b`, in place and without temporaries. Shapes broadcast to that of `tensor`.
///
/// # Errors
/// [`DistError::Torch`] if shapes or kinds do not fit, or `tensor` is a leaf under autograd.
pub fn addcmul_(tensor: &Tensor, a: &Tensor, b: &Tensor, value: f64) -> Result<(), DistError> {
    ffi::addcmul(tensor, a, b, value).map_err(torch("addcmul_"))
}

/// `tensor += value * a / b`, in place and without temporaries. Shapes broadcast to that of `tensor`.
///
/// # Errors
/// As [`addcmul_`].
pub fn addcdiv_(tensor: &Tensor, a: &Tensor, b: &Tensor, value: f64) -> Result<(), DistError> {
    ffi::addcdiv(tensor, a, b, value).map_err(torch("addcdiv_"))
}

fn torch(operation: &'static str) -> impl Fn(String) -> DistError {
    move |cause| DistError::Torch { operation, cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, no_grad};

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::<f32>::try_from(tensor.to_kind(Kind::Float)).unwrap()
    }

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn backward_weighs_each_output_with_its_gradient() {
        let x = leaf(&[2.0, 3.0]);
        let outputs = [&x * &x, &x * 10.0];
        let gradients = [Tensor::from_slice(&[1.0f32, 100.0]), Tensor::from_slice(&[1.0f32, 0.0])];
        backward(&outputs, &gradients).unwrap();
        assert_eq!(values(&x.grad()), [4.0 + 10.0, 600.0]);
    }

    #[test]
    fn backward_refuses_a_gradient_of_another_shape() {
        let x = leaf(&[2.0, 3.0]);
        let error = backward(&[&x * 2.0], &[Tensor::from_slice(&[1.0f32])]).unwrap_err();
        assert!(matches!(error, DistError::Torch { operation: "backward", .. }), "{error}");
        assert!(error.to_string().contains("shape"), "{error}");
    }

    #[test]
    fn gradients_accumulate_into_the_memory_that_set_grad_names() {
        let flat = Tensor::zeros([3], (Kind::Float, tch::Device::Cpu));
        let (a, b) = (leaf(&[2.0]), leaf(&[3.0, 4.0]));
        set_grad(&a, &flat.narrow(0, 0, 1)).unwrap();
        set_grad(&b, &flat.narrow(0, 1, 2)).unwrap();
        for _ in 0..2 {
            (&a * b.sum(Kind::Float)).sum(Kind::Float).backward();
        }
        assert_eq!(values(&flat), [14.0, 4.0, 4.0]);
    }

    #[test]
    fn set_grad_refuses_another_shape_kind_or_a_tensor_without_gradient() {
        let zeros = |n: i64, kind| Tensor::zeros([n], (kind, tch::Device::Cpu));
        for (tensor, gradient, why) in [
            (leaf(&[1.0]), zeros(2, Kind::Float), "[2]"),
            (leaf(&[1.0]), zeros(1, Kind::Double), "Double"),
            (zeros(1, Kind::Float), zeros(1, Kind::Float), "not a leaf"),
            (leaf(&[1.0]) * 2.0, zeros(1, Kind::Float), "not a leaf"),
        ] {
            let error = set_grad(&tensor, &gradient).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn fused_updates_change_the_tensor_in_place() {
        let (x, a, b) = (leaf(&[1.0, 1.0]), Tensor::from_slice(&[2.0f32, 3.0]), Tensor::from_slice(&[4.0f32, 2.0]));
        assert!(matches!(addcmul_(&x, &a, &b, 0.5), Err(DistError::Torch { .. })), "a leaf under autograd");
        no_grad(|| addcmul_(&x, &a, &b, 0.5)).unwrap();
        assert_eq!(values(&x.detach()), [5.0, 4.0]);
        no_grad(|| addcdiv_(&x, &a, &b, -2.0)).unwrap();
        assert_eq!(values(&x.detach()), [4.0, 1.0]);
    }
}
