"""Requests made up from the description of our own endpoints: whatever they say, the service does not fail."""

from __future__ import annotations

from typing import Any

import pytest

import autoglm_lab as lab
from autoglm_lab.server.run import Serving

schemathesis = pytest.importorskip("schemathesis")
hypothesis = pytest.importorskip("hypothesis")

_ENDLESS = "/v1/memory/events"


def test_no_request_makes_the_service_fail(wb: lab.Workbench, served: Serving) -> None:
    # So that no answer is long, whatever is asked for.
    wb.policy = wb.policy.replace(kv={"max_tokens": 48}, generation={"max_new_tokens": 4})
    root = served.url.removesuffix("/v1")
    schema = schemathesis.openapi.from_url(f"{root}/openapi.json")
    asked: list[str] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == _ENDLESS:
            continue

        @hypothesis.settings(
            max_examples=6, derandomize=True, database=None, deadline=None, suppress_health_check=hypothesis.HealthCheck
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call(base_url=root, timeout=60)
            assert response.status_code < 500, (response.status_code, response.text, case.as_curl_command())

        ask()
        asked.append(f"{operation.method.upper()} {operation.path}")
    assert {"POST /v1/chat/completions", "POST /v1/responses", "PATCH /v1/memory/policy"} <= set(asked)
    assert len(asked) >= 15
