//! Manifests of a chain so small that it learns nothing, and takes seconds.

/// A TrainingJob `tiny` with two data-parallel workers that checkpoints every `checkpoint_every` steps.
pub fn training(steps: u32, checkpoint_every: u32) -> String {
    format!(
        "
apiVersion: sensorium.dev/v1alpha1
kind: TrainingJob
metadata: {{name: tiny}}
spec:
  model:
    architecture:
      width: 16
      text: {{layers: 1, width: 16, heads: 2, mlpRatio: 2, maxLength: 12}}
      image:
        size: 64
        stem:
          - {{channels: 8, kernel: 5, stride: 4, padding: 2}}
          - {{channels: 16, kernel: 3, stride: 4, padding: 1}}
        layers: 1
        width: 16
        heads: 2
        mlpRatio: 2
      fusion: {{layers: 1, heads: 2, mlpRatio: 2}}
  data: {{train: 'pvc://datasets/easy-vqa/train', evaluation: 'pvc://datasets/easy-vqa/test'}}
  tasks: [{{type: vqa}}]
  training:
    steps: {steps}
    batch: {{images: 8, questionsPerImage: 1}}
    optimizer: {{learningRate: 0.002, warmupSteps: 5}}
  parallelism: {{data: 2}}
  workers: 2
  checkpoint: {{everySteps: {checkpoint_every}, keep: 2}}
  output: {{artifact: tiny}}
"
    )
}

/// A CompressionJob `tiny-int8` of what [`training`] makes, whose gate lets everything pass.
pub fn compression() -> String {
    "
apiVersion: sensorium.dev/v1alpha1
kind: CompressionJob
metadata: {name: tiny-int8}
spec:
  source: {artifact: tiny}
  steps: [{quantize: {calibration: {data: 'pvc://datasets/easy-vqa/train', samples: 32}}}]
  acceptance: {data: 'pvc://datasets/easy-vqa/test', maxDrop: 1.0}
  output: {artifact: tiny-int8}
"
    .to_owned()
}

/// A ServingJob `tiny` that serves `artifact` on ports that are hardly ever taken, and asks it three questions.
pub fn serving(artifact: &str) -> String {
    format!(
        "
apiVersion: sensorium.dev/v1alpha1
kind: ServingJob
metadata: {{name: tiny}}
spec:
  model: {{artifact: {artifact}}}
  ports: {{grpc: 18001, http: 18000, metrics: 18002}}
  verification: {{data: 'pvc://datasets/easy-vqa/test', samples: 3}}
"
    )
}
