"""Makes the sample bucket, and puts a minute of postings into it. Runs in the augmenter's image."""

import asyncio
import json
import sys
import time

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

_BUCKET = "rl-data"
_WAIT_SECONDS = 60
_COMPANIES = ("Acme", "Globex", "Initech", "Umbrella", "Hooli")
_TITLES = ("Intern", "Engineer", "Senior Engineer", "Head of Sales", "Chief Financial Officer")


async def main(endpoint: str) -> None:
    """Wait for the server, then fill the bucket."""
    config = AioConfig(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"})
    lines = [
        json.dumps({"url": f"https://example.com/{n}", "company": company, "title": title})
        for n in range(20)
        for company in _COMPANIES
        for title in _TITLES
    ]
    give_up_at = time.monotonic() + _WAIT_SECONDS
    async with get_session().create_client("s3", endpoint_url=endpoint, config=config) as client:
        while True:
            try:
                if _BUCKET not in {one["Name"] for one in (await client.list_buckets())["Buckets"]}:
                    await client.create_bucket(Bucket=_BUCKET)
                break
            except Exception:  # any error of a server that is starting
                if time.monotonic() > give_up_at:
                    raise
                await asyncio.sleep(1)
        key = f"job-postings-raw/{int(time.time())}.jsonl"
        await client.put_object(Bucket=_BUCKET, Key=key, Body="\n".join(lines).encode() + b"\n")
    sys.stdout.write(f"s3://{_BUCKET}/{key}: {len(lines)} postings\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
