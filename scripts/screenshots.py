"""Take the screenshots of the status page in `docs/img/`: `make screenshots`.

Redis, a model stub, three replicas and their callers run on this machine. The reports of the ten minutes
before are written to Redis as replicas write them; the traffic while the screenshots are taken is real.
"""

import asyncio
import io
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import redis
from PIL import Image
from playwright.async_api import async_playwright

from protos import seniority_pb2, seniority_pb2_grpc
from services.cache_proxy.redis_keys import QueueKeys
from services.cache_proxy.status.rolling_window import (
    INTERVAL_SECONDS,
    MINUTE_SECONDS,
    CallerTotals,
    MinuteReport,
    encode_report,
)
from tests.support.browser import FLAGS, chromium_program
from tests.support.processes import ServiceProcess, cache_proxy, model_stub
from tests.support.redis_server import redis_process

FOLDER = Path(__file__).parents[1] / "docs" / "img"
PICTURES = {"status-light": ("light", 1100), "status-dark": ("dark", 1100), "status-phone": ("light", 360)}
"""Colour scheme and width, by the name of the file."""

SCALE = 1.5
COLOURS = 128
PREFIX = "seniority"
SEED = 1
PAST_MINUTES = 10
BUSY_MINUTES_AGO = range(3, 6)
REPLICAS = 3
CALLERS = 6
NEW_PAIRS = 4000
TRAFFIC_SECONDS = 4


def main() -> int:
    """Write all screenshots."""
    program = chromium_program()
    if program is None:
        print("chromium is not installed", file=sys.stderr)
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _fleet() as proxies:
        asyncio.run(_take_screenshots(program, proxies))
    return 0


@contextmanager
def _fleet() -> Iterator[list[ServiceProcess]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(redis_process(folder))
        stub = stack.enter_context(model_stub())
        flags = ("--model-target", stub.target, "--cache-url", server.url, "--cache-timeout", "5s")
        proxies = [stack.enter_context(cache_proxy(*flags)) for _ in range(REPLICAS)]
        _write_history(server.url)
        yield proxies


def _write_history(url: str) -> None:
    dice = random.Random(SEED)  # noqa: S311 - a picture
    limit = QueueKeys(prefix=PREFIX, namespace="").limit
    with redis.Redis.from_url(url) as client:
        now_seconds = int(client.time()[0])
        this = now_seconds // MINUTE_SECONDS
        for number in range(this - PAST_MINUTES, this + 1):
            over = now_seconds % MINUTE_SECONDS // INTERVAL_SECONDS if number == this else None
            for replica in range(REPLICAS):
                minute = _minute(dice, busy=this - number in BUSY_MINUTES_AGO, spans=over)
                key = f"{limit}:reports:{number}"
                client.hset(key, f"{replica:016x}", encode_report(minute))
                client.expire(key, 2 * PAST_MINUTES * MINUTE_SECONDS)


def _minute(dice: random.Random, *, busy: bool, spans: int | None) -> MinuteReport:
    minute = MinuteReport(
        callers=[
            CallerTotals("augmenter", dice.randint(180_000, 190_000), dice.randint(1500, 2500)),
            CallerTotals("search-ranking", dice.randint(20_000, 26_000), dice.randint(40, 90)),
            CallerTotals("pricing-team", dice.randint(3000, 5000), dice.randint(300, 500)),
            CallerTotals("talent-insights", dice.randint(600, 900), dice.randint(0, 9)),
        ]
    )
    for span in minute.intervals[:spans]:
        span.calls = sum(dice.random() < (0.95 if busy else 0.35) for _ in range(3))
        span.sent = sum(dice.randint(150, 1000) for _ in range(span.calls))
        span.hits = sum(caller.hits for caller in minute.callers) // len(minute.intervals)
        span.inferred, span.coalesced = span.sent, dice.randint(0, 60)
        span.requests = span.hits // 700
    return minute


async def _send(target: str, pairs: list[tuple[str, str]], caller: str, priority: str) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        model = seniority_pb2_grpc.SeniorityModelStub(channel)
        batch = [seniority_pb2.SeniorityRequest(company=company, title=title) for company, title in pairs]
        await model.InferSeniority(
            seniority_pb2.SeniorityRequestBatch(batch=batch),
            timeout=60,
            metadata=[("x-caller", caller), ("x-priority", priority)],
        )


async def _take_screenshots(program: str, proxies: list[ServiceProcess]) -> None:
    calls = [
        asyncio.create_task(
            _send(
                proxies[number % len(proxies)].target,
                [(f"Company {number}-{at}", "Senior Engineer") for at in range(NEW_PAIRS)],
                "augmenter" if number else "pricing-team",
                "bulk" if number else "interactive",
            )
        )
        for number in range(CALLERS)
    ]
    await asyncio.sleep(TRAFFIC_SECONDS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=FLAGS)
        for name, (scheme, width) in PICTURES.items():
            page = await browser.new_page(
                viewport={"width": width, "height": 800},
                device_scale_factor=SCALE,
                color_scheme="dark" if scheme == "dark" else "light",
            )
            await page.goto(proxies[0].http_url)
            taken = Image.open(io.BytesIO(await page.screenshot(full_page=True)))
            taken.convert("RGB").quantize(COLOURS).save(FOLDER / f"{name}.png", optimize=True)
            await page.close()
        await browser.close()
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
