"""KServe's inference clients as published, REST and gRPC, in the v2 protocol."""

import asyncio
import sys

import httpx
import numpy as np
from common import arguments, values

# The package reads the command line of whoever imports it.
args, sys.argv = arguments(__doc__), sys.argv[:1]
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig  # noqa: E402


def request(model, array, binary):
    given = InferInput("x", list(array.shape), "FP32")
    given.set_data_from_numpy(array, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[given], request_id="7")


async def check_rest(address):
    base = f"http://{address}"
    array = values("FP32", (2, 3))
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(base) and await client.is_server_ready(base)
        assert await client.is_model_ready(base, "identity_fp32")
        assert not await client.is_model_ready(base, "elsewhere")
        for binary in (False, True):
            asked = request("identity_fp32", array, binary)
            answer = await client.infer(base, asked, model_name="identity_fp32")
            assert answer.id == "7" and answer.model_name == "identity_fp32", answer
            np.testing.assert_allclose(answer.outputs[0].as_numpy().reshape(2, 3), array)
        try:
            await client.infer(base, request("elsewhere", array, False), model_name="elsewhere")
        except httpx.HTTPStatusError as error:
            assert error.response.status_code == 404 and "elsewhere" in str(error), error
        else:
            raise AssertionError("an unknown model was answered")


async def check_grpc(address):
    array = values("FP32", (2, 3))
    async with InferenceGRPCClient(address) as client:
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready("identity_fp32")
        for binary in (False, True):
            answer = await client.infer(request("identity_fp32", array, binary))
            assert answer.id == "7", answer
            np.testing.assert_allclose(answer.outputs[0].as_numpy().reshape(2, 3), array)


async def main():
    await check_rest(args.http)
    await check_grpc(args.grpc)
    print("ok")


asyncio.run(main())
