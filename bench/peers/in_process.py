"""Runs a TorchScript model without a server, and prints what it did as `bench-server` does for ONNX.

    python in_process.py MODEL.pt SECONDS DEVICE < REQUEST

A request is the header of an HTTP request, one line of JSON, and the bytes of its tensors.
"""

import json
import math
import sys
import time

import numpy as np
from sessions import open_session

WARM_UP = 0.2
# TorchScript looks at its first runs before it settles.
WARM_UP_RUNS = 4


def main() -> None:
    path, seconds, device = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    header = json.loads(sys.stdin.buffer.readline())
    types = {"FP32": np.float32, "INT64": np.int64}
    values = []
    for tensor in header["inputs"]:
        dtype = np.dtype(types[tensor["datatype"]])
        data = bytearray(sys.stdin.buffer.read(math.prod(tensor["shape"]) * dtype.itemsize))
        values.append(np.frombuffer(data, dtype).reshape(tensor["shape"]))
    session = open_session(path, device)

    def once() -> float:
        started = time.perf_counter()
        session.run(values)
        return time.perf_counter() - started

    warm, runs = time.perf_counter(), 0
    while time.perf_counter() - warm < WARM_UP or runs < WARM_UP_RUNS:
        once()
        runs += 1
    started, runs = time.perf_counter(), []
    while time.perf_counter() - started < seconds:
        runs.append(once())
    batch = header["inputs"][0]["shape"][0]
    rows_per_second = len(runs) * batch / (time.perf_counter() - started)
    print(json.dumps({"batch": batch, "rows_per_second": rows_per_second, "median": sorted(runs)[len(runs) // 2]}))


if __name__ == "__main__":
    main()
