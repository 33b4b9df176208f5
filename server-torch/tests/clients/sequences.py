"""tritonclient's streams as published: eight sequences on the four rows of a model that adds up what it is sent."""

import queue
import sys

import numpy as np
import tritonclient.grpc as triton

SEQUENCES, STEPS = 8, 25

answers = queue.Queue()
with triton.InferenceServerClient(sys.argv[1]) as client:
    assert client.get_model_config("adder").config.platform == "pytorch_libtorch"

# Two sequences to each stream: one after the other there, beside each other over all.
clients = []
for pair in range(SEQUENCES // 2):
    client = triton.InferenceServerClient(sys.argv[1])
    client.start_stream(lambda result, error: answers.put((result, error)))
    clients.append(client)
for half in range(2):
    for step in range(STEPS):
        for pair, client in enumerate(clients):
            sequence = 1 + pair * 2 + half
            value = np.array([[sequence * 1000 + step]], dtype=np.float32)
            tensor = triton.InferInput("INPUT__0", [1, 1], "FP32")
            tensor.set_data_from_numpy(value)
            client.async_stream_infer(
                "adder",
                [tensor],
                request_id=f"{sequence} {step}",
                sequence_id=sequence,
                sequence_start=step == 0,
                sequence_end=step == STEPS - 1,
            )
found = {}
for _ in range(SEQUENCES * STEPS):
    result, error = answers.get(timeout=60)
    assert error is None, error
    found[result.get_response().id] = result.as_numpy("OUTPUT__0")[0, 0]
for client in clients:
    client.stop_stream()
    client.close()
for sequence in range(1, SEQUENCES + 1):
    total = 0
    for step in range(STEPS):
        total += sequence * 1000 + step
        assert found[f"{sequence} {step}"] == total, (sequence, step, found[f"{sequence} {step}"], total)
print("ok")
