"""The model behind the proxy: the dispatcher and the client."""
