"""Server reflection, v1 and v1alpha, for the public protos and no other file that the process has loaded.

`grpcio-reflection` supports v1alpha only. The messages of v1 are the same in another package, so one servicer
serves both, and v1's descriptor is derived from v1alpha's.
"""

from typing import Any

import grpc
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from protos import seniority_pb2

_V1ALPHA = "grpc.reflection.v1alpha"
_V1 = "grpc.reflection.v1"
_SERVICE = "ServerReflection"
_METHOD = "ServerReflectionInfo"


def add_to(server: Any) -> None:
    """Add both versions to `server`, which may be a `BoundedServiceRegistrar`."""
    files = (seniority_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    pool = DescriptorPool()
    for file in files:
        pool.Add(_file_proto(file))
    pool.Add(_v1_file_proto())
    names = [service.full_name for file in files for service in file.services_by_name.values()]
    servicer = reflection.aio.ReflectionServicer([*names, f"{_V1}.{_SERVICE}"], pool=pool)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(f"{_V1}.{_SERVICE}", {_METHOD: handler})


def _file_proto(file: Any) -> descriptor_pb2.FileDescriptorProto:
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _v1_file_proto() -> descriptor_pb2.FileDescriptorProto:
    """Return v1alpha's file with its name, its package and all references to its types renamed."""
    proto = _file_proto(reflection_pb2.DESCRIPTOR)
    proto.name = "grpc/reflection/v1/reflection.proto"
    proto.package = _V1
    for message in proto.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(_V1ALPHA, _V1)
    for service in proto.service:
        for method in service.method:
            method.input_type = method.input_type.replace(_V1ALPHA, _V1)
            method.output_type = method.output_type.replace(_V1ALPHA, _V1)
    return proto
