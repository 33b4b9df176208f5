//! What training does with a group, against one process that does it all.

use sensorium_dist::{ProcessGroup, ReduceOp, autograd};
use tch::{Device, Kind, Tensor};

use crate::ranks::ranks;

/// The same numbers on every rank: `[rows, columns]`.
fn random(seed: i64, rows: i64, columns: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn([rows, columns], (Kind::Float, Device::Cpu))
}

/// This rank's rows of a batch.
fn own_rows(group: &ProcessGroup, batch: &Tensor) -> Tensor {
    let rows = batch.size()[0] / i64::from(group.size());
    batch.narrow(0, i64::from(group.rank()) * rows, rows)
}

/// Equal but for the order of sums, which is another one on each kind of processor: the neighbour of a number around 10 is
/// 1e-6 away already, so that the bound grows with the numbers.
#[track_caller]
fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    let difference = (found - expected).abs().max().double_value(&[]);
    let largest = expected.abs().max().double_value(&[]);
    assert!(difference < 1e-6 * largest.max(1.0), "{what} of up to {largest} differs by {difference:e}");
}

#[test]
fn averaged_gradients_of_parts_are_the_gradient_of_the_batch() {
    ranks(2).run(|group| {
        let (inputs, targets) = (random(1, 8, 5), random(2, 8, 3));
        let gradient_of = |inputs: &Tensor, targets: &Tensor, flat: &Tensor| {
            let weight = random(3, 5, 3).set_requires_grad(true);
            autograd::set_grad(&weight, &flat.view([5, 3])).unwrap();
            (inputs.matmul(&weight) - targets).square().mean(Kind::Float).backward();
        };
        let (whole, part) =
            (Tensor::zeros([15], (Kind::Float, Device::Cpu)), Tensor::zeros([15], (Kind::Float, Device::Cpu)));
        gradient_of(&inputs, &targets, &whole);
        gradient_of(&own_rows(group, &inputs), &own_rows(group, &targets), &part);
        // The flat buffer is the gradient: one operation reduces all parameters.
        group.all_reduce(&part, ReduceOp::Avg).unwrap().wait().unwrap();
        assert_close(&part, &whole, "gradient");
    });
}

/// Mean cross-entropy of finding each image's text among all texts; `first` is the index of the first image's text.
fn contrastive_loss(images_nd: &Tensor, texts_md: &Tensor, first: i64) -> Tensor {
    let labels = Tensor::arange(images_nd.size()[0], (Kind::Int64, Device::Cpu)) + first;
    images_nd.matmul(&texts_md.transpose(0, 1)).cross_entropy_for_logits(&labels)
}

#[test]
fn a_contrastive_loss_over_gathered_features_has_the_gradients_of_one_process() {
    ranks(4).run(|group| {
        let (images, texts) = (random(1, 8, 6), random(2, 8, 6));
        let parameters = || (random(3, 6, 4).set_requires_grad(true), random(4, 6, 4).set_requires_grad(true));

        let (image_weight, text_weight) = parameters();
        let loss = contrastive_loss(&images.matmul(&image_weight), &texts.matmul(&text_weight), 0);
        loss.backward();

        let (own_image_weight, own_text_weight) = parameters();
        let own_images = own_rows(group, &images).matmul(&own_image_weight);
        let own_texts = own_rows(group, &texts).matmul(&own_text_weight);
        // The gathered features are a leaf: the graph ends here, and goes on at `own_texts` on every rank.
        let all_texts = Tensor::zeros([8, 4], (Kind::Float, Device::Cpu));
        group.all_gather_into(&all_texts, &own_texts).unwrap().wait().unwrap();
        let all_texts = all_texts.set_requires_grad(true);
        let own_loss = contrastive_loss(&own_images, &all_texts, i64::from(group.rank()) * 2);
        own_loss.backward();
        // A rank's texts are in every rank's loss, so their gradient is the sum over ranks.
        let text_gradient = own_texts.zeros_like();
        group.reduce_scatter_into(&text_gradient, &all_texts.grad(), ReduceOp::Sum).unwrap().wait().unwrap();
        autograd::backward(&[own_texts], &[text_gradient]).unwrap();

        let own_loss = own_loss.detach();
        for (found, expected, what) in [
            (own_loss, loss.detach(), "loss"),
            (own_image_weight.grad(), image_weight.grad(), "image gradient"),
            (own_text_weight.grad(), text_weight.grad(), "text gradient"),
        ] {
            group.all_reduce(&found, ReduceOp::Avg).unwrap().wait().unwrap();
            assert_close(&found, &expected, what);
        }
    });
}
