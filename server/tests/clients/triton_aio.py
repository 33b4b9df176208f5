"""tritonclient's asyncio clients as published, gRPC and HTTP."""

import asyncio

import numpy as np
import tritonclient.grpc.aio as aio_grpc
import tritonclient.http.aio as aio_http
from common import arguments, tensor, values


async def check(client, module):
    assert await client.is_server_live() and await client.is_server_ready()
    assert await client.is_model_ready("identity_fp32")
    assert not await client.is_model_ready("elsewhere")
    arrays = [values("FP32", (1, size)) for size in range(1, 33)]
    infer = lambda array: client.infer("identity_fp32", [tensor(module, "x", array, "FP32")])
    for array, result in zip(arrays, await asyncio.gather(*map(infer, arrays))):
        np.testing.assert_array_equal(result.as_numpy("y"), array)
    assert (await client.get_inference_statistics("identity_fp32")) is not None
    assert (await client.get_model_config("identity_fp32")) is not None
    await client.close()


async def main():
    args = arguments(__doc__)
    await check(aio_grpc.InferenceServerClient(args.grpc), aio_grpc)
    await check(aio_http.InferenceServerClient(args.http), aio_http)
    print("ok")


asyncio.run(main())
