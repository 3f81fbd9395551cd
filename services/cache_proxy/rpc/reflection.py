"""Server reflection, v1 and v1alpha: the public protos and nothing else that the process has loaded.

`grpcio-reflection` knows v1alpha only. v1 has the same messages in another package, so the servicer of the
one answers for the other; its descriptor is made from v1alpha's.
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
    """Serve both on `server`, or on what generated code takes for one."""
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
    described = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(described)
    return described


def _v1_file_proto() -> descriptor_pb2.FileDescriptorProto:
    """Return v1alpha's file, renamed: name, package and every reference to a type of its own."""
    described = _file_proto(reflection_pb2.DESCRIPTOR)
    described.name = "grpc/reflection/v1/reflection.proto"
    described.package = _V1
    for message in described.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(_V1ALPHA, _V1)
    for service in described.service:
        for method in service.method:
            method.input_type = method.input_type.replace(_V1ALPHA, _V1)
            method.output_type = method.output_type.replace(_V1ALPHA, _V1)
    return described
