"""The status page: what an operator wants to know at a glance, with nothing but a browser."""
