"""`cache-proxy get`: show the cached level of a pair."""

import json
import sys
from datetime import UTC, datetime

from services.cache_proxy.cache.entry import DAY_ZERO_SECONDS, entry_day, entry_level
from services.cache_proxy.commands.session import open_session
from services.cache_proxy.config.cache_settings import CacheSettings, KeySettings
from services.cache_proxy.config.command_settings import OutputSettings, PairSettings
from services.cache_proxy.domain import DAY_SECONDS
from services.common.errors import CommandError, UsageError


async def run(pair: PairSettings, output: OutputSettings, cache: CacheSettings, key: KeySettings) -> None:
    """Print the level of a pair and the day it was inferred on. Raises `CommandError` if it is not cached."""
    if pair.pair is None:
        raise UsageError("--company and --title say which pair")
    async with open_session(cache, key) as session:
        digest = session.digest(*pair.pair)
        [entry] = await session.store.get([digest])
    level = entry_level(entry)
    day = datetime.fromtimestamp(DAY_ZERO_SECONDS + entry_day(entry) * DAY_SECONDS, UTC).date().isoformat()
    if output.json:
        found = {"level": level, "inferred_on": day} if entry else {"level": None}
        company, title = pair.pair
        answer = {"company": company, "title": title, "model_version": key.model_version, **found}
        sys.stdout.write(json.dumps(answer) + "\n")
    elif entry:
        sys.stdout.write(f"{level}\tinferred on {day}\n")
    if not entry:
        raise CommandError("the pair is not in the cache")
