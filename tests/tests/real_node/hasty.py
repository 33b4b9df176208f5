"""Asks a server over HTTP and gives it little time: hasty.py ADDRESS MODEL QUESTIONS.JSON MILLISECONDS SECONDS

The server is told how long its caller waits (grpc-timeout), and says itself that it was too late, or before it begins that
it would be; the caller hears it out. Prints how many were answered and how many were too late; any other answer is a failure."""

import http.client
import json
import os
import struct
import sys
import time


def main():
    address, model, path, milliseconds, seconds = sys.argv[1:6]
    until = time.monotonic() + float(seconds)
    with open(path, encoding="utf-8") as file:
        questions = json.load(file)
    answered = late = 0
    while time.monotonic() < until:
        image, question, _ = questions[(answered + late) % len(questions)]
        with open(os.path.join(os.path.dirname(path), image), "rb") as file:
            items = {"image": file.read(), "text": question.encode()}
        # Each is a string of bytes after its length, in the order of the header.
        binary = {name: struct.pack("<I", len(item)) + item for name, item in items.items()}
        inputs = [
            {"name": name, "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
            for name, data in binary.items()
        ]
        header = json.dumps({"inputs": inputs}).encode()
        connection = http.client.HTTPConnection(address, timeout=30)
        headers = {"Inference-Header-Content-Length": str(len(header)), "grpc-timeout": f"{milliseconds}m"}
        connection.request("POST", f"/v2/models/{model}/infer", header + b"".join(binary.values()), headers)
        response = connection.getresponse()
        said = response.read()
        connection.close()
        if response.status == 200:
            answered += 1
        elif response.status in (429, 504):
            late += 1
        else:
            raise SystemExit(f"{response.status}: {said}")
        time.sleep(0.02)
    print(json.dumps({"answered": answered, "late": late}))


main()
