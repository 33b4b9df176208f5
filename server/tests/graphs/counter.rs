//! A model whose requests are loops: it counts up from `base` until it has made so many `steps`.

use sensorium_onnx::{DType, Dim, GraphBuilder};

/// Entries of the table that every step looks into with `slip`: one beyond them is an error.
const TABLE: i64 = 4;

/// `count' = count + 1`, `y = base + count'` in a row of `width`, `done = count' >= steps`; `ended` is what the graph is told
/// of the last permitted step. A request with `slip` 0 goes well; one with 1 fails in the step in which `count` is `TABLE`.
pub(crate) fn counter(width: i64) -> Vec<u8> {
    const BATCH: Dim<'static> = Dim::Symbol("batch");
    let one = [BATCH, Dim::Fixed(1)];
    let mut graph = GraphBuilder::new("counter");
    let steps = graph.input("steps", DType::F32, &one);
    let base = graph.input("base", DType::F32, &one);
    let slip = graph.input("slip", DType::I64, &one);
    let end = graph.input("end", DType::F32, &one);
    let count = graph.input("count", DType::F32, &one);
    let unit = graph.scalar_f32(1.0);
    let next = graph.node("Add", &[&count, &unit], vec![]);
    let y = graph.node("Add", &[&base, &next], vec![]);
    let row = graph.initializer_f32("row", &[1, width], vec![0.0; width as usize]);
    let y = graph.node("Add", &[&y, &row], vec![]);
    let done = graph.node("GreaterOrEqual", &[&next, &steps], vec![]);
    let ended = graph.node("Identity", &[&end], vec![]);
    // The look into the table, which adds nothing.
    let whole = graph.node("Cast", &[&count], vec![sensorium_onnx::Attribute::int("to", i64::from(DType::I64.code()))]);
    let index = graph.node("Mul", &[&whole, &slip], vec![]);
    let table = graph.initializer_f32("table", &[TABLE], vec![0.0; TABLE as usize]);
    let nothing = graph.node("Gather", &[&table, &index], vec![]);
    let next = graph.node("Add", &[&next, &nothing], vec![]);
    graph.output("y", &y, DType::F32, &[BATCH, Dim::Fixed(width)]);
    graph.output("done", &done, DType::Bool, &one);
    graph.output("ended", &ended, DType::F32, &one);
    graph.output("count_out", &next, DType::F32, &one);
    graph.finish(20).unwrap().to_bytes()
}

/// Its configuration: with this in `sequence_batching`, and so many steps at most.
pub(crate) fn config(sequence: &str, most_steps: usize) -> String {
    format!(
        r#"max_batch_size: 4
        model_transaction_policy {{ decoupled: true }}
        sequence_batching {{
          iterative_sequence: true
          {sequence}
          control_input {{ name: "end" control {{ kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0, 1 ] }} }}
          state {{ input_name: "count" output_name: "count_out" data_type: TYPE_FP32 dims: [ 1 ] }}
        }}
        parameters {{ key: "iteration_end" value {{ string_value: "done" }} }}
        parameters {{ key: "iteration_most_steps" value {{ string_value: "{most_steps}" }} }}"#
    )
}
