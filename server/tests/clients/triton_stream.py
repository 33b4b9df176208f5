"""tritonclient's streams as published: many requests in flight, errors in their place, the mark of the last response."""

import asyncio
import queue

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from common import arguments, tensor, values


def check_stream(address):
    arrays = [values("FP32", (1, size)) for size in range(1, 201)]
    done = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        for index, array in enumerate(arrays):
            # Every tenth request is wrong, and the stream goes on.
            model = "elsewhere" if index % 10 == 9 else "identity_fp32"
            client.async_stream_infer(
                model,
                [tensor(triton, "x", array, "FP32")],
                request_id=str(index),
                enable_empty_final_response=True,
            )
        for index, array in enumerate(arrays):
            result, error = done.get(timeout=60)
            if index % 10 == 9:
                assert "elsewhere" in error.message(), (index, error)
                continue
            assert error is None, error
            response = result.get_response()
            assert response.id == str(index), "answers come in the order of the requests"
            assert response.parameters["triton_final_response"].bool_param
            np.testing.assert_array_equal(result.as_numpy("y"), array)
        client.stop_stream()


async def check_aio(address):
    arrays = [values("FP32", (1, size)) for size in range(1, 41)]

    async def requests():
        for array in arrays:
            yield {"model_name": "identity_fp32", "inputs": [tensor(aio, "x", array, "FP32")]}

    async with aio.InferenceServerClient(address) as client:
        answers = client.stream_infer(requests())
        index = 0
        async for result, error in answers:
            assert error is None, error
            np.testing.assert_array_equal(result.as_numpy("y"), arrays[index])
            index += 1
        assert index == len(arrays)


args = arguments(__doc__)
check_stream(args.grpc)
asyncio.run(check_aio(args.grpc))
print("ok")
