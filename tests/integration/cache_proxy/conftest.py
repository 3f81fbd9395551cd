"""A proxy as a process between a test's caller and a test's model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support.caller import Caller, caller
from tests.support.model_server import ScriptedModel, scripted_model, well
from tests.support.processes import Service, cache_proxy

UNPACED = ("--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "5ms")
"""No test but those of the limits waits for them."""


@dataclass(frozen=True)
class Stage:
    """A caller, the proxy that it calls, and the model behind."""

    caller: Caller
    proxy: Service
    model: ScriptedModel


StageWith = Callable[..., Stage]


@pytest.fixture(scope="session")
def _shared_stage() -> Iterator[Stage]:
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, "--cache-url", "memory:", *UNPACED) as proxy,
        caller(proxy.target) as asking,
    ):
        yield Stage(asking, proxy, model)


@pytest.fixture
def stage(_shared_stage: Stage) -> Iterator[Stage]:
    """One unpaced proxy for many tests: each keeps to companies of its own, and may script the model."""
    yield _shared_stage
    _shared_stage.model.behaviour = well


@pytest.fixture
def stage_with() -> Iterator[StageWith]:
    """Start a proxy of the test's own, with these flags (default: `memory:`), before a model of its own."""
    with ExitStack() as stack:

        def start(*args: str, model: ScriptedModel | None = None) -> Stage:
            behind = model or stack.enter_context(scripted_model())
            store = () if "--cache-url" in args else ("--cache-url", "memory:")
            proxy = stack.enter_context(cache_proxy("--model-target", behind.target, *store, *args))
            return Stage(stack.enter_context(caller(proxy.target)), proxy, behind)

        yield start
