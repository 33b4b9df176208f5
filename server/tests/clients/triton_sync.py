"""tritonclient as published, gRPC or HTTP: every call that both have, with all of their options."""

import json
import os
import queue

import numpy as np
import tritonclient.utils.shared_memory as shm
from common import IDENTITIES, arguments, refused, tensor, values


def check_metadata(client, is_grpc):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("identity_fp32") and client.is_model_ready("identity_fp32", "1")
    assert not client.is_model_ready("elsewhere") and not client.is_model_ready("identity_fp32", "9")
    as_json = {"as_json": True} if is_grpc else {}
    server = client.get_server_metadata(**as_json)
    assert server["name"] == "sensorium" and "statistics" in server["extensions"], server
    metadata = client.get_model_metadata("identity_fp32", **as_json)
    assert metadata["versions"] == ["1"], metadata
    assert [(i["name"], i["datatype"]) for i in metadata["inputs"]] == [("x", "FP32")], metadata
    config = client.get_model_config("identity_fp32", **as_json)
    config = config["config"] if is_grpc else config
    assert config["name"] == "identity_fp32" and config["max_batch_size"] > 0, config
    assert config["input"][0]["data_type"] == "TYPE_FP32", config
    # What nobody has written is there, too: tools begin with it.
    (group,) = config["instance_group"]
    assert (group["name"], group["kind"], group["count"]) == ("identity_fp32", "KIND_CPU", 1), config
    assert config["default_model_filename"] == "model.onnx" and "optimization" in config, config
    refused(lambda: client.get_model_metadata("elsewhere"), ("NOT_FOUND", "404"), "elsewhere")


def check_datatypes(client, module, is_grpc):
    for datatype in IDENTITIES:
        array = values(datatype, (3, 5))
        name = f"identity_{datatype.lower()}"
        result = client.infer(name, [tensor(module, "x", array, datatype)], request_id="7")
        np.testing.assert_array_equal(result.as_numpy("y"), array)
        response = result.get_response()
        assert (response.id if is_grpc else response["id"]) == "7"
        if is_grpc or datatype == "FP16":
            continue
        # As JSON, there and back.
        inputs = [tensor(module, "x", array, datatype, binary_data=False)]
        outputs = [module.InferRequestedOutput("y", binary_data=False)]
        np.testing.assert_array_equal(client.infer(name, inputs, outputs=outputs).as_numpy("y"), array)
    specials = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45]], dtype=np.float32)
    for how in [{}] if is_grpc else [{"binary_data": True}, {"binary_data": False}]:
        outputs = [module.InferRequestedOutput("y", **how)]
        result = client.infer("identity_fp32", [tensor(module, "x", specials, "FP32", **how)], outputs=outputs)
        np.testing.assert_array_equal(result.as_numpy("y"), specials)


def check_options(client, module, is_grpc):
    array = values("FP32", (2, 3))
    inputs = [tensor(module, "x", array, "FP32")]
    outputs = [module.InferRequestedOutput("y")]
    infer = lambda **options: client.infer("identity_fp32", inputs, outputs=outputs, **options).as_numpy("y")
    np.testing.assert_array_equal(infer(model_version="1"), array)
    np.testing.assert_array_equal(infer(priority=1, timeout=60_000_000), array)
    np.testing.assert_array_equal(infer(parameters={"mine": 1, "other": "x", "flag": True}), array)
    for compression in ("gzip", "deflate"):
        if is_grpc:
            np.testing.assert_array_equal(infer(compression_algorithm=compression), array)
        else:
            both = {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
            np.testing.assert_array_equal(infer(**both), array)
    classes = [module.InferRequestedOutput("y", class_count=2)]
    found = client.infer("identity_fp32", inputs, outputs=classes).as_numpy("y")
    assert found.shape == (2, 2), found
    assert [int(top.decode().split(":")[1]) for top in found[:, 0]] == array.argmax(axis=1).tolist(), found


def check_async(client, module, is_grpc):
    arrays = [values("FP32", (1, size)) for size in range(1, 21)]
    if is_grpc:
        done = queue.Queue()
        for index, array in enumerate(arrays):
            inputs = [tensor(module, "x", array, "FP32")]
            client.async_infer("identity_fp32", inputs, lambda result, error, i=index: done.put((i, result, error)))
        for _ in arrays:
            index, result, error = done.get(timeout=60)
            assert error is None, error
            np.testing.assert_array_equal(result.as_numpy("y"), arrays[index])
    else:
        waiting = [client.async_infer("identity_fp32", [tensor(module, "x", array, "FP32")]) for array in arrays]
        for array, answer in zip(arrays, waiting):
            np.testing.assert_array_equal(answer.get_result().as_numpy("y"), array)


def check_shared_memory(client, module, is_grpc):
    array = values("FP32", (4, 8))
    size = array.nbytes
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    key = f"/sensorium_client_{os.getpid()}"
    region = shm.create_shared_memory_region("tensors", key, 2 * size)
    try:
        shm.set_shared_memory_region(region, [array])
        client.register_system_shared_memory("tensors", key, 2 * size)
        status = client.get_system_shared_memory_status(**({"as_json": True} if is_grpc else {}))
        regions = list(status["regions"].values()) if is_grpc else status
        assert [r["name"] for r in regions] == ["tensors"] and int(regions[0]["byte_size"]) == 2 * size, status
        given = module.InferInput("x", list(array.shape), "FP32")
        given.set_shared_memory("tensors", size)
        wanted = module.InferRequestedOutput("y")
        wanted.set_shared_memory("tensors", size, offset=size)
        result = client.infer("identity_fp32", [given], outputs=[wanted])
        output = result.get_output("y")
        shape = output.shape if is_grpc else output["shape"]
        np.testing.assert_array_equal(shm.get_contents_as_numpy(region, np.float32, list(shape), size), array)
        refused(
            lambda: client.register_system_shared_memory("tensors", key, size), ("ALREADY_EXISTS", "409"), "already"
        )
        refused(
            lambda: client.register_system_shared_memory("more", key, 9 * size), ("INVALID_ARGUMENT", "400"), "not inside"
        )
        client.unregister_system_shared_memory("tensors")
        refused(lambda: client.infer("identity_fp32", [given]), ("NOT_FOUND", "404"), "register it first")
        refused(
            lambda: client.register_cuda_shared_memory("gpu", b"aGFuZGxl", 0, size), ("UNIMPLEMENTED", "501"), "CUDA"
        )
    finally:
        shm.destroy_shared_memory_region(region)


def check_management(client, is_grpc):
    as_json = {"as_json": True} if is_grpc else {}
    statistics = client.get_inference_statistics("identity_fp32", **as_json)["model_stats"][0]
    assert int(statistics["inference_stats"]["success"]["count"]) > 20, statistics
    assert int(statistics["inference_count"]) >= int(statistics["execution_count"]) > 0, statistics
    assert len(client.get_inference_statistics(**as_json)["model_stats"]) >= len(IDENTITIES)

    index = client.get_model_repository_index(**as_json)
    index = index["models"] if is_grpc else index
    states = {model["name"]: model.get("state") for model in index}
    assert states["identity_fp32"] == "READY", states
    client.unload_model("identity_int8")
    assert not client.is_model_ready("identity_int8")
    client.load_model("identity_int8")
    assert client.is_model_ready("identity_int8")
    config = json.dumps({"max_batch_size": 3, "backend": "onnxruntime"})
    client.load_model("identity_int8", config=config)
    config = client.get_model_config("identity_int8", **as_json)
    assert (config["config"] if is_grpc else config)["max_batch_size"] == 3, config
    client.load_model("identity_int8")
    refused(lambda: client.load_model("elsewhere"), ("NOT_FOUND", "404"), "elsewhere")

    settings = client.get_log_settings(**as_json)
    assert "log_verbose_level" in str(settings), settings
    client.update_log_settings({"log_verbose_level": 1, "log_info": True})
    client.update_log_settings({"log_verbose_level": 0})
    refused(lambda: client.update_log_settings({"log_file": "/tmp/x"}), ("UNIMPLEMENTED", "501"), "log_file")
    client.update_trace_settings(settings={"trace_rate": "5", "trace_level": ["TIMESTAMPS"]})
    assert "5" in str(client.get_trace_settings(**as_json)), client.get_trace_settings()
    client.update_trace_settings(model_name="identity_fp32", settings={"trace_rate": "9"})
    client.update_trace_settings(model_name="identity_fp32", settings={"trace_rate": None})
    assert "5" in str(client.get_trace_settings(model_name="identity_fp32"))


def check_refusals(client, module):
    array = values("FP32", (1, 2))
    invalid = ("INVALID_ARGUMENT", "400")
    infer = lambda model, *inputs, **options: client.infer(model, list(inputs), **options)
    given = tensor(module, "x", array, "FP32")
    refused(lambda: infer("elsewhere", given), ("NOT_FOUND", "404"), "elsewhere")
    refused(lambda: infer("identity_fp32", given, model_version="7"), ("NOT_FOUND", "404"), "version")
    refused(lambda: infer("identity_int32", given), invalid, "takes INT32")
    refused(lambda: infer("identity_fp32", tensor(module, "z", array, "FP32")), invalid, "not one of the model's")
    refused(lambda: infer("identity_fp32", given, given), invalid, "twice")
    outputs = [module.InferRequestedOutput("z")]
    refused(lambda: infer("identity_fp32", given, outputs=outputs), invalid, "not one of the model's")


def main():
    args = arguments(__doc__)
    is_grpc = args.protocol == "grpc"
    if is_grpc:
        import tritonclient.grpc as module

        options = {}
        if args.tls:
            pem = lambda name: f"{args.tls}/{name}"
            options = {"ssl": True, "root_certificates": pem("ca.pem")}
            options |= {"private_key": pem("client.key"), "certificate_chain": pem("client.pem")}
        client = module.InferenceServerClient(args.grpc, **options)
    else:
        import tritonclient.http as module

        options = {}
        if args.tls:
            import ssl

            def context():
                made = ssl.create_default_context(cafile=f"{args.tls}/ca.pem")
                made.load_cert_chain(f"{args.tls}/client.pem", f"{args.tls}/client.key")
                return made

            options = {"ssl": True, "ssl_context_factory": context}
        client = module.InferenceServerClient(args.http, concurrency=4, **options)
    if args.token:
        from tritonclient.utils import InferenceServerException

        array = values("FP32", (1, 2))
        infer = lambda token: client.infer(
            "identity_fp32", [tensor(module, "x", array, "FP32")], headers={"authorization": f"Bearer {token}"}
        )
        np.testing.assert_array_equal(infer(args.token).as_numpy("y"), array)
        for wrong in ("", "wrong-wrong-wrong-wrong"):
            refused(lambda: infer(wrong), ("UNAUTHENTICATED", "401"), "token")
        print("ok")
        return
    check_metadata(client, is_grpc)
    check_datatypes(client, module, is_grpc)
    check_options(client, module, is_grpc)
    check_async(client, module, is_grpc)
    check_shared_memory(client, module, is_grpc)
    check_management(client, is_grpc)
    check_refusals(client, module)
    client.close()
    print("ok")


if __name__ == "__main__":
    main()
