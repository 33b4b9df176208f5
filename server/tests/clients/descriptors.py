"""Prints the descriptors of tritonclient's and KServe's own messages, as a FileDescriptorSet in base64 per line."""

import base64

from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2

files = descriptor_pb2.FileDescriptorSet()
for module in (model_config_pb2, service_pb2):
    module.DESCRIPTOR.CopyToProto(files.file.add())
print(base64.b64encode(files.SerializeToString()).decode())
