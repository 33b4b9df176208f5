"""KServe's Python runtime around onnxruntime.

    python kserve_server.py NAME MODEL.onnx HTTP_PORT GRPC_PORT
"""

import logging
import sys

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from onnxruntime_session import NUMPY_TYPES, open_session


class OnnxModel(Model):
    def __init__(self, name: str, path: str):
        super().__init__(name)
        self.path = path
        self.load()

    def load(self) -> bool:
        self.session = open_session(self.path)
        self.ready = True
        return self.ready

    def predict(self, payload: InferRequest, headers=None) -> InferResponse:
        inputs = {input.name: input.as_numpy() for input in payload.inputs}
        for declared in self.session.get_inputs():
            if len(declared.shape) == 0:
                inputs[declared.name] = inputs[declared.name].reshape(())
        outputs = []
        for declared, value in zip(self.session.get_outputs(), self.session.run(None, inputs)):
            datatype, _ = NUMPY_TYPES[declared.type]
            output = InferOutput(declared.name, list(value.shape), datatype)
            output.set_data_from_numpy(value, binary_data=True)
            outputs.append(output)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=outputs)


if __name__ == "__main__":
    name, path, http_port, grpc_port = sys.argv[1:]
    # A line for each request would be part of what is measured.
    logging.disable(logging.INFO)
    server = ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_latency_logging=False)
    server.start([OnnxModel(name, path)])
