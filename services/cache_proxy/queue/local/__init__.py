"""The queue of one process, used without Redis and while Redis is lost."""
