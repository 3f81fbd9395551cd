"""List the keys below a prefix page by page, from servers with and without an order of keys."""

import logging
from collections.abc import AsyncGenerator
from typing import Any, TypeAlias

from botocore.exceptions import ClientError

_UNSUPPORTED_STATUSES = {400, 405, 501}
_Page: TypeAlias = list[dict[str, Any]]
_log = logging.getLogger(__name__)


class KeyListing:
    """Lists the keys of one store.

    State: `is_unordered`, whether a page was not in order; `_supports_start_after`, true until the server
    rejects it.
    """

    def __init__(self, client: Any, *, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._supports_start_after = True
        self.is_unordered = False

    async def entries(self, *, after: str = "") -> AsyncGenerator[dict[str, Any]]:
        """Yield the entry of each key whose name below the prefix is behind `after`. Raises ClientError.

        Entries are in the order of the keys, unless `is_unordered`: then in any order, some perhaps twice.
        `is_unordered` is set before the first entry of the page that is not in order.
        """
        first = (self._prefix + after).encode()
        async for page in self._pages({"StartAfter": self._prefix + after} if after else {}):
            for entry in page:
                # A server may ignore StartAfter.
                if not after or entry["Key"].encode() > first:
                    yield entry

    async def _pages(self, start: dict[str, str]) -> AsyncGenerator[_Page]:
        start = start if self._supports_start_after else {}
        try:
            last = b""
            async for page in self._request_pages(start):
                keys = [entry["Key"].encode() for entry in page]
                if keys != sorted(keys) or any(key < last for key in keys[:1]):
                    self.is_unordered = True
                    if start:
                        break
                last = keys[-1] if keys else last
                yield page
            else:
                return
        except ClientError as error:
            if not start or error.response["ResponseMetadata"]["HTTPStatusCode"] not in _UNSUPPORTED_STATUSES:
                raise
            _log.info(
                "s3://%s/%s: no StartAfter at this server; all keys are listed", self._bucket, self._prefix
            )
        # List again from the beginning: without an order, wanted keys may be listed before `start`.
        self._supports_start_after = False
        async for page in self._pages({}):
            yield page

    async def _request_pages(self, start: dict[str, str]) -> AsyncGenerator[_Page]:
        pages = self._client.get_paginator("list_objects_v2")
        async for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix, **start):
            yield page.get("Contents", [])
