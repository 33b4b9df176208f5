"""KServe's Python runtime around onnxruntime or torch.

    python kserve_server.py NAME MODEL HTTP_PORT GRPC_PORT
"""

import logging
import sys

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from sessions import open_session


class MeasuredModel(Model):
    def __init__(self, name: str, path: str):
        super().__init__(name)
        self.path = path
        self.load()

    def load(self) -> bool:
        self.session = open_session(self.path)
        self.ready = True
        return self.ready

    def predict(self, payload: InferRequest, headers=None) -> InferResponse:
        given = {input.name: input.as_numpy() for input in payload.inputs}
        values = [given[name].reshape(()) if is_scalar else given[name] for name, is_scalar in self.session.inputs]
        outputs = []
        for (name, datatype), value in zip(self.session.outputs, self.session.run(values)):
            output = InferOutput(name, list(value.shape), datatype)
            output.set_data_from_numpy(value, binary_data=True)
            outputs.append(output)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=outputs)


if __name__ == "__main__":
    name, path, http_port, grpc_port = sys.argv[1:]
    # A line for each request would be part of what is measured.
    logging.disable(logging.INFO)
    server = ModelServer(http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_latency_logging=False)
    server.start([MeasuredModel(name, path)])
