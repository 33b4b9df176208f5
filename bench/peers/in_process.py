"""Runs a TorchScript model without a server, as often as it is told to, and prints what it did as `bench-server` does for ONNX.

    python in_process.py MODEL.pt DEVICE < REQUEST-AND-ORDERS

A request of one row is the header of an HTTP request, one line of JSON, and the bytes of its tensors. An order is a line,
`BATCH SECONDS`.
"""

import json
import math
import sys
import time

import numpy as np
from sessions import open_session

WARM_UP = 0.05
# TorchScript looks at its first runs before it settles.
WARM_UP_RUNS = 4


def main() -> None:
    path, device = sys.argv[1:]
    header = json.loads(sys.stdin.buffer.readline())
    types = {"FP32": np.float32, "INT64": np.int64}
    row = []
    for tensor in header["inputs"]:
        dtype = np.dtype(types[tensor["datatype"]])
        data = sys.stdin.buffer.read(math.prod(tensor["shape"]) * dtype.itemsize)
        row.append(np.frombuffer(data, dtype).reshape(tensor["shape"]))
    session = open_session(path, device)
    for order in sys.stdin.buffer:
        batch, seconds = order.split()
        print(json.dumps(run(session, row, int(batch), float(seconds))), flush=True)


def run(session, row: list[np.ndarray], batch: int, seconds: float) -> dict[str, float]:
    values = [np.repeat(value, batch, axis=0) for value in row]

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
    rows_per_second = len(runs) * batch / (time.perf_counter() - started)
    return {"rows_per_second": rows_per_second, "median": sorted(runs)[len(runs) // 2]}


if __name__ == "__main__":
    main()
