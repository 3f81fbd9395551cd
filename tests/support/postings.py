"""Job postings as lines of an input file."""

import json


def make_posting(company: str = "Acme", title: str = "Clerk", **more: object) -> bytes:
    """Return a line of input, without its end."""
    return json.dumps({"company": company, "title": title, **more}).encode()
