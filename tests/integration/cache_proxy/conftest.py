"""A proxy process between a caller and a scripted model of the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.caller import Caller, open_caller
from tests.support.model_server import ScriptedModel, answer_all, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy

UNLIMITED_RATE_FLAGS = ("--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "5ms")
"""For tests that should not wait for the rate limit."""


@dataclass(frozen=True)
class ProxyEnvironment:
    """A caller, the proxy that it calls, and the model behind the proxy."""

    caller: Caller
    proxy: ServiceProcess
    model: ScriptedModel


StartProxyEnvironment = Callable[..., ProxyEnvironment]


@pytest.fixture(scope="session")
def _shared_stage() -> Iterator[ProxyEnvironment]:
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS) as proxy,
        open_caller(proxy.target) as caller,
    ):
        yield ProxyEnvironment(caller, proxy, model)


@pytest.fixture
def stage(_shared_stage: ProxyEnvironment) -> Iterator[ProxyEnvironment]:
    """Return a proxy without a rate limit, shared by many tests.

    Each test uses companies that no other test uses, and may set the model's behaviour.
    """
    yield _shared_stage
    _shared_stage.model.behaviour = answer_all


@pytest.fixture
def stage_with() -> Iterator[StartProxyEnvironment]:
    """Return a function that starts a proxy with the given flags, and a model unless one is given.

    The cache defaults to `memory:`.
    """
    with ExitStack() as stack:

        def start(*args: str, model: ScriptedModel | None = None) -> ProxyEnvironment:
            used_model = model or stack.enter_context(scripted_model())
            cache_flags = () if "--cache-url" in args else ("--cache-url", "memory:")
            proxy = stack.enter_context(cache_proxy("--model-target", used_model.target, *cache_flags, *args))
            return ProxyEnvironment(stack.enter_context(open_caller(proxy.target)), proxy, used_model)

        yield start
