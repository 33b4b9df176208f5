"""tritonclient's streams with a model that answers a request with several responses."""

import asyncio
import queue

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from common import arguments, refused, tensor


def inputs(module, steps, base):
    one = lambda name, value: tensor(module, name, np.full((1, 1), value, np.float32), "FP32")
    return [one("steps", steps), one("base", base), tensor(module, "slip", np.zeros((1, 1), np.int64), "INT64")]


def is_last(result):
    return result.get_response().parameters["triton_final_response"].bool_param


def check_many(address):
    """More requests than there are places, each with as many responses as it wants."""
    lengths = [1 + index * 7 % 40 for index in range(20)]
    done = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        for index, steps in enumerate(lengths):
            client.async_stream_infer(
                "counter",
                inputs(triton, steps, index * 1000),
                request_id=str(index),
                enable_empty_final_response=index % 2 == 0,
            )
        found = [[] for _ in lengths]
        ended = set()
        while len(ended) < len(lengths):
            result, error = done.get(timeout=60)
            assert error is None, error
            index = int(result.get_response().id)
            assert index not in ended, f"request {index} goes on behind its last response"
            found[index].append(float(result.as_numpy("y")[0, 0]))
            if is_last(result):
                ended.add(index)
        for index, steps in enumerate(lengths):
            assert found[index] == [index * 1000 + step for step in range(1, steps + 1)], (index, found[index])
        client.stop_stream()


def check_errors(address):
    """An error is the last word of its request, and the stream goes on."""
    done = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        refused(lambda: client.infer("counter", inputs(triton, 1, 0)), "UNIMPLEMENTED", "is decoupled")
        client.start_stream(lambda result, error: done.put((result, error)))
        wrong = inputs(triton, 9, 0)
        wrong[2].set_data_from_numpy(np.ones((1, 1), np.int64))
        client.async_stream_infer("counter", wrong)
        for step in range(1, 5):
            result, error = done.get(timeout=60)
            assert error is None and result.as_numpy("y")[0, 0] == step, (step, error)
        result, error = done.get(timeout=60)
        assert "failed" in error.message(), error
        client.async_stream_infer("counter", inputs(triton, 1, 5), sequence_id=7)
        result, error = done.get(timeout=60)
        assert "leave sequence_id out, or set sequence_start" in error.message(), error
        client.async_stream_infer("counter", inputs(triton, 1, 5), sequence_id=7, sequence_start=True)
        result, error = done.get(timeout=60)
        assert error is None and result.as_numpy("y")[0, 0] == 6 and is_last(result), error
        client.stop_stream()


def check_cancel(address):
    """All places are taken by requests that never end, and come back when their streams are cancelled."""
    for _ in range(3):
        with triton.InferenceServerClient(address) as client:
            seen = queue.Queue(maxsize=8)

            def callback(result, error):
                if not seen.full():
                    seen.put((result, error))

            client.start_stream(callback)
            for _ in range(4):
                client.async_stream_infer("counter", inputs(triton, 1e9, 0))
            for _ in range(4):
                result, error = seen.get(timeout=60)
                assert error is None and not is_last(result), error
            client.stop_stream(cancel_requests=True)
    check_many(address)


async def check_aio(address):
    async def requests():
        yield {"model_name": "counter", "inputs": inputs(aio, 5, 100)}

    async with aio.InferenceServerClient(address) as client:
        found = []
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            found.append((float(result.as_numpy("y")[0, 0]), is_last(result)))
        assert found == [(101.0, False), (102.0, False), (103.0, False), (104.0, False), (105.0, True)], found


args = arguments(__doc__)
check_many(args.grpc)
check_errors(args.grpc)
check_cancel(args.grpc)
asyncio.run(check_aio(args.grpc))
print("ok")
