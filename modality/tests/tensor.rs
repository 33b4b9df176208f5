//! Laws of putting tensors together and taking them apart.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use sensorium_modality::{DType, Tensor, TensorData, TensorError};

fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(shape, values.to_vec()).unwrap()
}

#[test]
fn a_shape_must_hold_exactly_its_elements() {
    let error = Tensor::from_vec([2, 3], vec![0_i64; 5]).unwrap_err();
    assert_eq!(error, TensorError::ShapeMismatch { shape: vec![2, 3], elements: 5 });
    assert_eq!(error.to_string(), "shape [2, 3] does not hold 5 elements");
}

#[test]
fn a_shape_whose_product_overflows_is_refused() {
    let error = Tensor::from_vec([usize::MAX, 2], Vec::<f32>::new()).unwrap_err();
    assert_eq!(error, TensorError::ShapeMismatch { shape: vec![usize::MAX, 2], elements: 0 });
}

#[test]
fn a_scalar_has_one_element_and_no_rows() {
    let scalar = f32s(&[], &[7.0]);
    assert_eq!((scalar.len(), scalar.row_count()), (1, None));
    assert_eq!(scalar.rows(0..0).unwrap_err(), TensorError::NoSuchRow { row: 0, shape: vec![] });
    assert_eq!(Tensor::concat(&[scalar]).unwrap_err(), TensorError::NoSuchRow { row: 0, shape: vec![] });
}

#[test]
fn stacking_nothing_is_an_error() {
    assert_eq!(Tensor::stack::<Tensor>(&[]).unwrap_err(), TensorError::Nothing);
    assert_eq!(Tensor::concat::<Tensor>(&[]).unwrap_err(), TensorError::Nothing);
}

#[test]
fn the_first_tensor_that_differs_is_named() {
    let error = Tensor::stack(&[f32s(&[2], &[0.0; 2]), f32s(&[2], &[0.0; 2]), f32s(&[3], &[0.0; 3])]).unwrap_err();
    assert_eq!(error.to_string(), "item 2 is f32[3], the first is f32[2]");
    let ids = Tensor::from_vec([1, 2], vec![0_i64; 2]).unwrap();
    let error = Tensor::concat(&[f32s(&[1, 2], &[0.0; 2]), ids]).unwrap_err();
    assert_eq!(error.to_string(), "item 1 is i64[1, 2], the first is f32[1, 2]");
}

#[test]
fn a_slice_of_another_type_is_refused() {
    let error = f32s(&[1], &[0.0]).as_slice::<i64>().unwrap_err();
    assert_eq!(error, TensorError::WrongDType { wanted: DType::I64, got: DType::F32 });
}

#[test]
fn rows_past_the_end_are_refused() {
    let tensor = f32s(&[2, 1], &[0.0, 1.0]);
    assert_eq!(tensor.rows(1..3).unwrap_err(), TensorError::NoSuchRow { row: 3, shape: vec![2, 1] });
    assert_eq!(tensor.select(&[0, 2]).unwrap_err(), TensorError::NoSuchRow { row: 2, shape: vec![2, 1] });
    #[expect(clippy::reversed_empty_ranges, reason = "a range that runs backwards is the case")]
    let backwards = tensor.rows(2..1);
    assert_eq!(backwards.unwrap_err(), TensorError::NoSuchRow { row: 1, shape: vec![2, 1] });
}

#[test]
fn strings_of_bytes_keep_their_own_lengths() {
    let texts = Tensor::from_bytes(["a", "", "ccc"]);
    let swapped = texts.select(&[2, 1]).unwrap();
    assert_eq!(swapped.data(), &TensorData::Bytes(vec![b"ccc".to_vec(), vec![]]));
}

fn any_data(elements: usize) -> impl Strategy<Value = TensorData> {
    prop_oneof![
        prop::collection::vec(-1e6_f32..1e6, elements).prop_map(TensorData::F32),
        prop::collection::vec(-1e6_f64..1e6, elements).prop_map(TensorData::F64),
        prop::collection::vec(any::<i64>(), elements).prop_map(TensorData::I64),
        prop::collection::vec(any::<i32>(), elements).prop_map(TensorData::I32),
        prop::collection::vec(any::<i8>(), elements).prop_map(TensorData::I8),
        prop::collection::vec(any::<u8>(), elements).prop_map(TensorData::U8),
        prop::collection::vec(any::<bool>(), elements).prop_map(TensorData::Bool),
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), elements).prop_map(TensorData::Bytes),
    ]
}

prop_compose! {
    fn any_matrix()(shape in prop::collection::vec(0_usize..4, 1..4))
        (data in any_data(shape.iter().product()), shape in Just(shape)) -> Tensor {
        Tensor::new(shape, data).unwrap()
    }
}

proptest! {
    #[test]
    fn stacked_rows_come_out_as_they_went_in(tensor in any_matrix(), copies in 1_usize..4) {
        let stacked = Tensor::stack(&vec![&tensor; copies]).unwrap();
        prop_assert_eq!(stacked.row_count(), Some(copies));
        for index in 0..copies {
            prop_assert_eq!(&stacked.row(index).unwrap(), &tensor);
        }
    }

    #[test]
    fn a_tensor_cut_anywhere_and_joined_is_the_same(tensor in any_matrix(), cut in any::<prop::sample::Index>()) {
        let rows = tensor.row_count().unwrap();
        let cut = cut.index(rows + 1);
        let parts = [tensor.rows(0..cut).unwrap(), tensor.rows(cut..rows).unwrap()];
        prop_assert_eq!(Tensor::concat(&parts).unwrap(), tensor);
    }

    #[test]
    fn selecting_every_row_in_order_changes_nothing(tensor in any_matrix()) {
        let order: Vec<usize> = (0..tensor.row_count().unwrap()).collect();
        prop_assert_eq!(tensor.select(&order).unwrap(), tensor);
    }
}
