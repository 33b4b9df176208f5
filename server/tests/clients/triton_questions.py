"""Questions about pictures with tritonclient (gRPC) as published: strings and images as BYTES tensors."""

import queue

import numpy as np
import tritonclient.grpc as triton
from common import arguments, refused


def column(name, items):
    """A BYTES input of shape [N]."""
    tensor = triton.InferInput(name, [len(items)], "BYTES")
    tensor.set_data_from_numpy(np.array(items, dtype=np.object_))
    return tensor


def check_metadata(client, model):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready(model) and not client.is_model_ready("elsewhere")
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "sensorium", server
    metadata = client.get_model_metadata(model)
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [
        ("image", "BYTES", [-1]),
        ("text", "BYTES", [-1]),
    ], metadata
    assert [o.name for o in metadata.outputs] == ["answer", "score"], metadata


def check_questions(client, model, image, question, expected):
    inputs = [column("image", [image] * 3), column("text", [question.encode()] * 3)]
    for compression in (None, "gzip", "deflate"):
        result = client.infer(model, inputs, request_id="7", compression_algorithm=compression, client_timeout=60)
        assert result.get_response().id == "7"
        assert result.as_numpy("answer").tolist() == [expected.encode()] * 3, result.as_numpy("answer")
        assert result.as_numpy("score").dtype == np.float32 and (result.as_numpy("score") > 0.5).all()
    only = client.infer(model, inputs, outputs=[triton.InferRequestedOutput("score")], priority=1, timeout=60_000_000)
    assert only.as_numpy("answer") is None and only.as_numpy("score").shape == (3,)
    answers = queue.Queue()
    for _ in range(20):
        client.async_infer(model, inputs, lambda result, error: answers.put((result, error)))
    for _ in range(20):
        result, error = answers.get(timeout=60)
        assert error is None and result.as_numpy("answer")[0] == expected.encode(), error


def check_graph(client, model):
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    tensor = triton.InferInput("pixel_values", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels)
    features = client.infer(f"{model}.image_encoder", [tensor]).as_numpy("image_features")
    assert features.shape == (2, 1, 4)
    np.testing.assert_allclose(features[:, 0, :3], pixels.mean(axis=(2, 3)), rtol=1e-5)


def check_refusals(client, model):
    question = column("text", [b"what?"])
    refused(lambda: client.infer("elsewhere", [question]), "NOT_FOUND", "elsewhere")
    refused(lambda: client.get_model_metadata(model, "2"), "NOT_FOUND", "version")
    refused(lambda: client.infer(model, [question]), "INVALID_ARGUMENT", '"image" is missing')
    refused(lambda: client.infer(model, [column("image", [b"no image"]), question]), "INVALID_ARGUMENT", "PNG")
    half = triton.InferInput("pixel_values", [1, 3, 8, 8], "FP16")
    half.set_data_from_numpy(np.zeros((1, 3, 8, 8), dtype=np.float16))
    refused(lambda: client.infer(f"{model}.image_encoder", [half]), "INVALID_ARGUMENT", "FP16")


def main():
    args = arguments(__doc__)
    with open(args.image, "rb") as file:
        image = file.read()
    with triton.InferenceServerClient(args.grpc) as client:
        check_metadata(client, "tiny")
        check_questions(client, "tiny", image, args.question, "blue")
        check_graph(client, "tiny")
        check_refusals(client, "tiny")
    print("ok")


if __name__ == "__main__":
    main()
