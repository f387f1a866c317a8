"""`/metrics` for Prometheus: the ledger's rows, phases, keys and values, requests and errors. A registry a service."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from autoglm_lab.engine.local import LocalEngine
from autoglm_lab.engine.protocol import Answer
from autoglm_lab.memory.ledger import Ledger
from autoglm_lab.server.request_error import RequestError, request_error

_log = logging.getLogger("autoglm_lab.server")
_PHASES = ("load", "encode", "prefill", "decode", "train", "idle")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """What is counted of one service.

    Args:
        waiting: tells the answers under way and the requests that wait.
    """

    def __init__(self, engine: LocalEngine, waiting: Callable[[], tuple[int, int]]) -> None:
        self._registry = CollectorRegistry()
        register = self._registry
        self._answers = Counter(
            "autoglm_answers", "Answers by endpoint and how they ended", ["endpoint", "finish"], registry=register
        )
        self._errors = Counter("autoglm_errors", "Requests that were refused or failed", ["code"], registry=register)
        self._tokens = Counter(
            "autoglm_tokens", "Tokens: of prompts, of those reused, and written", ["kind"], registry=register
        )
        self._first = Histogram(
            "autoglm_first_token_seconds", "From submission to the first token", buckets=_SECONDS, registry=register
        )
        self._total = Histogram(
            "autoglm_answer_seconds", "From submission to the end", buckets=_SECONDS, registry=register
        )
        register.register(_Gauges(engine, waiting))

    def answered(self, endpoint: str, answer: Answer) -> None:
        """Count an answer, and log its figures."""
        usage, timings = answer.usage, answer.timings
        self._answers.labels(endpoint, answer.finish_reason).inc()
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        if timings.first_token is not None:
            self._first.observe(timings.first_token)
        self._total.observe(timings.total)
        _log.info("%s %s: %s", endpoint, answer.finish_reason, answer.figures)

    def failed(self, endpoint: str, error: BaseException) -> RequestError:
        """Count an error, log it, and say what its client is told. What nobody raised on purpose is logged whole."""
        told = request_error(error)
        self._errors.labels(told.code).inc()
        if told.code == "internal":
            notes = "\n".join(getattr(error, "__notes__", ()))
            _log.error("%s failed: %s: %s\n%s", endpoint, type(error).__name__, error, notes, exc_info=error)
        else:
            _log.info("%s refused: %d %s", endpoint, told.status, told.code)
        return told

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is read when it is asked for. Conversations are summed up: their names are their owners' business."""

    def __init__(self, engine: LocalEngine, waiting: Callable[[], tuple[int, int]]) -> None:
        self._engine, self._waiting = engine, waiting

    def describe(self) -> Iterable[Metric]:
        return ()  # reads nothing while it is registered

    def collect(self) -> Iterable[Metric]:
        engine = self._engine
        ledger = engine.ledger()
        yield from _memory(ledger)
        phase = GaugeMetricFamily("autoglm_phase", "1 for what the engine is doing", labels=["phase"])
        for name in dict.fromkeys([*_PHASES, ledger.phase]):
            phase.add_metric([name], float(name == ledger.phase))
        yield phase
        modules = GaugeMetricFamily(
            "autoglm_module_bytes", "Weights of a module, by where they are", labels=["module", "place"]
        )
        for module in engine.modules():
            modules.add_metric([module.name, module.place], module.nbytes)
        yield modules
        conversations = engine.conversations()
        yield GaugeMetricFamily("autoglm_conversations", "Conversations that are held", value=len(conversations))
        tokens = sum(one.tokens for one in conversations)
        yield GaugeMetricFamily("autoglm_kv_tokens", "Tokens of the conversations that are held", value=tokens)
        running, waiting = self._waiting()
        yield GaugeMetricFamily("autoglm_running", "Answers under way", value=running)
        yield GaugeMetricFamily("autoglm_waiting", "Requests that wait for a place", value=waiting)
        speed = engine.tokens_per_second
        if speed is not None:
            yield GaugeMetricFamily("autoglm_decode_tokens_per_second", "Of the last answer", value=speed)


def _memory(ledger: Ledger) -> Iterable[Metric]:
    rows = GaugeMetricFamily(
        "autoglm_memory_bytes", "The ledger's rows; on the device they add up", labels=["name", "kind", "place"]
    )
    sums: dict[tuple[str, str, str], int] = {}
    for row in ledger.rows:
        if row.nbytes is not None:
            key = ("keys and values" if row.kind == "kv" else row.name, row.kind, row.place)
            sums[key] = sums.get(key, 0) + row.nbytes
    for labels, nbytes in sums.items():
        rows.add_metric(labels, nbytes)
    yield rows
    yield GaugeMetricFamily("autoglm_device_bytes", "The whole device", value=ledger.total)
    if ledger.process is not None:
        yield GaugeMetricFamily("autoglm_process_bytes", "Of this process on the device", value=ledger.process)
    if ledger.budget is not None:
        yield GaugeMetricFamily("autoglm_budget_bytes", "What the process may use", value=ledger.budget)
