"""The model that every peer runs: as the server under test opens it, one thread, no spinning.

Both kinds have `inputs`, pairs of a name and whether it is a scalar, `outputs`, names with their type in the protocol, and
`run`, from arrays in the order of the inputs to arrays in the order of the outputs. The libraries are only loaded where
they are needed: their time and memory count as the peer's.
"""

import numpy as np

DATATYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}


class OnnxSession:
    def __init__(self, path: str):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [(input.name, len(input.shape) == 0) for input in self.session.get_inputs()]
        self.outputs = [(output.name, DATATYPES[output.type]) for output in self.session.get_outputs()]
        self.names = [name for name, _ in self.inputs]

    def run(self, values: list[np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, dict(zip(self.names, values)))


class TorchScriptSession:
    """A module whose `forward` takes tensors and gives one tensor of FP32, as all do that are measured."""

    def __init__(self, path: str, device: str):
        import torch

        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
        self.torch = torch
        self.device = device
        self.module = torch.jit.load(path, map_location=device).eval()
        # The first is the module itself.
        self.inputs = [(argument.name, False) for argument in self.module.forward.schema.arguments[1:]]
        self.outputs = [("OUTPUT__0", "FP32")]

    def run(self, values: list[np.ndarray]) -> list[np.ndarray]:
        # Without a copy; that arrays of a request cannot be written to is nothing to a model that does not.
        with self.torch.inference_mode():
            found = self.module(*(self.torch.from_numpy(value).to(self.device) for value in values))
        return [found.cpu().numpy()]


def open_session(path: str, device: str = "cpu") -> OnnxSession | TorchScriptSession:
    """A peer's session; `device`, in torch's words, is for TorchScript."""
    return TorchScriptSession(path, device) if path.endswith(".pt") else OnnxSession(path)
