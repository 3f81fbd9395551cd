"""Record each RPC in a span and in a debug log line. Used only where tracing or the debug log is on."""

import logging
from collections.abc import Mapping

from grpc import aio

from services.cache_proxy.auth.caller import Context
from services.cache_proxy.observability.rpc_metrics import outcome_kind
from services.cache_proxy.rpc.infer_method import register_infer
from services.cache_proxy.rpc.recorder import RpcRecorder
from services.cache_proxy.rpc.servicer import SeniorityServicer
from services.common.compat import override
from services.common.tracing import Tracing

_log = logging.getLogger(__name__)


class TracingRecorder(RpcRecorder):
    """A recorder that also sets the attributes of the RPC's span, and logs a line for each RPC at debug."""

    def __init__(self, recorder: RpcRecorder, *, tracing: Tracing, replica: str) -> None:
        self._recorder = recorder
        self._tracing = tracing
        self._replica = replica

    @override
    def count_quota_rejection(self, *, account: str, quota: str) -> None:
        self._recorder.count_quota_rejection(account=account, quota=quota)

    @override
    def count(self, *, code: str, seconds: float, caller: str, outcomes: Mapping[str, int]) -> None:
        self._recorder.count(code=code, seconds=seconds, caller=caller, outcomes=outcomes)
        hits, misses, failed = (
            sum(count for outcome, count in outcomes.items() if outcome_kind(outcome) == kind)
            for kind in ("hit", "miss", "failed")
        )
        pairs = hits + misses + failed
        span = self._tracing.current_span()
        span.set_attributes(
            caller=caller, replica=self._replica, pairs=pairs, hits=hits, misses=misses, failed=failed
        )
        span.set_status(code)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "%s to %s: %d pairs, %d hits, %d misses, %d failed, %.6f s",
                code,
                caller,
                pairs,
                hits,
                misses,
                failed,
                seconds,
                extra={
                    "event": "rpc",
                    "code": code,
                    "caller": caller,
                    "pairs": pairs,
                    "hits": hits,
                    "misses": misses,
                    "failed": failed,
                    "seconds": round(seconds, 6),
                },
            )


class TracedServicer:
    """A servicer each of whose RPCs is a span, in the caller's trace if the metadata names one."""

    def __init__(self, servicer: SeniorityServicer, *, tracing: Tracing) -> None:
        self._servicer = servicer
        self._tracing = tracing

    def add_to(self, server: aio.Server) -> None:
        """Register the method on `server`."""
        register_infer(server, self._infer)

    async def _infer(self, messages: object, context: Context) -> bytes:
        with self._tracing.server_span("InferSeniority", tuple(context.invocation_metadata() or ())):
            return await self._servicer.infer(messages, context)
