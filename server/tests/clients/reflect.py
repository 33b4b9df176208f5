"""gRPC reflection and health, asked with nothing but a channel and the standard's field numbers."""

import grpc
from common import arguments

args = arguments(__doc__)
with grpc.insecure_channel(args.grpc) as channel:
    for version in ("v1", "v1alpha"):
        ask = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
        # list_services is field 7, a string.
        answer = next(iter(ask(iter([b"\x3a\x01*"]), timeout=60)))
        for service in (b"inference.GRPCInferenceService", b"sensorium.v1.MultimodalService", b"grpc.health.v1.Health"):
            assert service in answer, (version, answer)
        # file_containing_symbol is field 4.
        name = b"inference.GRPCInferenceService"
        answer = next(iter(ask(iter([b"\x22" + bytes([len(name)]) + name]), timeout=60)))
        assert b"ModelStreamInfer" in answer, version
print("ok")
