"""Settings of the service and its commands, their flags and environment variables."""
