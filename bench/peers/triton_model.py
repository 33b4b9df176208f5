"""Triton's Python backend around onnxruntime or torch: the requests of an execution run as one batch where the model
batches."""

import json
import os
import sys

# The backend's interpreter knows nothing of the virtual environment.
sys.path.extend(os.environ["BENCH_PYTHON_PATH"].split(":"))

import numpy as np
import triton_python_backend_utils as pb_utils
from sessions import open_session


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.batches = config["max_batch_size"] > 0
        folder = os.path.join(args["model_repository"], args["model_version"])
        (path,) = filter(os.path.exists, (os.path.join(folder, name) for name in ("model.onnx", "model.pt")))
        self.session = open_session(path)

    def execute(self, requests):
        given = [[self.value(request, *input) for input in self.session.inputs] for request in requests]
        if not self.batches or len(requests) == 1:
            return [self.response(self.session.run(own)) for own in given]
        joined = [np.concatenate(parts) for parts in zip(*given)]
        found = self.session.run(joined)
        ends = np.cumsum([len(own[0]) for own in given])[:-1]
        split = [np.split(output, ends) for output in found]
        return [self.response(list(own)) for own in zip(*split)]

    def value(self, request, name, scalar):
        value = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        # A reshape of the configuration does not reach this backend.
        return value.reshape(()) if scalar else value

    def response(self, values):
        tensors = [pb_utils.Tensor(name, value) for (name, _), value in zip(self.session.outputs, values)]
        return pb_utils.InferenceResponse(output_tensors=tensors)
