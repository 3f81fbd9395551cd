"""The status page: the state of the proxy at a glance, in a browser."""
