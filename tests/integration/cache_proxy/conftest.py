"""A proxy as a process between a test's caller and a test's model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.caller import Caller, open_caller
from tests.support.model_server import ScriptedModel, answer_all, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy

UNLIMITED_RATE_FLAGS = ("--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "5ms")
"""No test but those of the limits waits for them."""


@dataclass(frozen=True)
class ProxyEnvironment:
    """A caller, the proxy that it calls, and the model behind."""

    caller: Caller
    proxy: ServiceProcess
    model: ScriptedModel


StartProxyEnvironment = Callable[..., ProxyEnvironment]


@pytest.fixture(scope="session")
def _shared_stage() -> Iterator[ProxyEnvironment]:
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS) as proxy,
        open_caller(proxy.target) as asking,
    ):
        yield ProxyEnvironment(asking, proxy, model)


@pytest.fixture
def stage(_shared_stage: ProxyEnvironment) -> Iterator[ProxyEnvironment]:
    """One unpaced proxy for many tests: each keeps to companies of its own, and may script the model."""
    yield _shared_stage
    _shared_stage.model.behaviour = answer_all


@pytest.fixture
def stage_with() -> Iterator[StartProxyEnvironment]:
    """Start a proxy of the test's own, with these flags (default: `memory:`), before a model of its own."""
    with ExitStack() as stack:

        def start(*args: str, model: ScriptedModel | None = None) -> ProxyEnvironment:
            behind = model or stack.enter_context(scripted_model())
            store = () if "--cache-url" in args else ("--cache-url", "memory:")
            proxy = stack.enter_context(cache_proxy("--model-target", behind.target, *store, *args))
            return ProxyEnvironment(stack.enter_context(open_caller(proxy.target)), proxy, behind)

        yield start
