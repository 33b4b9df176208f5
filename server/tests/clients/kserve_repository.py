"""KServe's dialect of loading: the model in field 1, and a reply that names it. Written with its own field numbers."""

import grpc
from common import arguments


def varint(field, wire, payload=b""):
    return bytes([field << 3 | wire]) + payload


def text(field, value):
    return varint(field, 2, bytes([len(value)]) + value.encode())


args = arguments(__doc__)
with grpc.insecure_channel(args.grpc) as channel:
    for method, flag in (("RepositoryModelUnload", "isUnloaded"), ("RepositoryModelLoad", "isLoaded")):
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        reply = call(text(1, "identity_uint8"), timeout=60)
        assert reply == text(1, "identity_uint8") + varint(2, 0, b"\x01"), (flag, reply)
print("ok")
