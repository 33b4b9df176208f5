"""Asks a server many questions with tritonclient (gRPC) as published: client.py ADDRESS MODEL QUESTIONS.JSON [SECONDS]

QUESTIONS.JSON lists [image file, question, expected answer]. Prints how many answers were right. With SECONDS it goes on
asking for so long, over a new connection now and then, and fails on the first request that fails."""

import json
import os
import sys
import time

import numpy as np
import tritonclient.grpc as triton

# A Service picks a server for a connection, not for a request.
PER_CONNECTION = 5


def column(name, item):
    tensor = triton.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([item], dtype=np.object_))
    return tensor


def main():
    address, model, path = sys.argv[1:4]
    until = time.monotonic() + float(sys.argv[4]) if len(sys.argv) > 4 else 0
    with open(path, encoding="utf-8") as file:
        questions = json.load(file)
    client = triton.InferenceServerClient(address)
    right = asked = 0
    while asked < len(questions) or time.monotonic() < until:
        image, question, expected = questions[asked % len(questions)]
        with open(os.path.join(os.path.dirname(path), image), "rb") as file:
            inputs = [column("image", file.read()), column("text", question.encode())]
        answer = client.infer(model, inputs, client_timeout=30).as_numpy("answer")[0].decode()
        asked += 1
        right += answer == expected
        if until:
            time.sleep(0.02)
            if asked % PER_CONNECTION == 0:
                client.close()
                client = triton.InferenceServerClient(address)
    print(json.dumps({"asked": asked, "right": right}))


main()
