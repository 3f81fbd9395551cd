"""The wire format of requests and responses, split and joined without protobuf."""
