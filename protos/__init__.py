"""The wire contract: `seniority.proto` and the stubs generated from it (`make protos`)."""
