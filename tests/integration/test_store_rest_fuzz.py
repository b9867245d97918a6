"""REST from its own OpenAPI document (schemathesis): valid and invalid requests of every operation, and never a 500."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
import schemathesis
from fastapi import FastAPI
from http_store import Served, served
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from agl_ray.store import LightningStore
from agl_ray.store.doors.rest import rest_app
from agl_ray.store.doors.rest_records import LONGEST_WAIT

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(f"sqlite:///{tmp_path_factory.mktemp('fuzz')}/store.db") as running:

        async def fill() -> None:
            store = running.client()
            await store.enqueue_rollout({"a": 1})
            await store.start_rollout("x", worker_id="w-1")

        asyncio.run(fill())
        yield running


document = cast(FastAPI, rest_app(LightningStore.http("http://127.0.0.1:1"))).openapi()
operations = schemathesis.openapi.from_dict(document)


@pytest.mark.slow
@operations.parametrize()
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_it(server: Served, case: Any) -> None:
    for part in (case.body, case.query):
        for wait in ("wait_seconds", "timeout"):  # it waits as long as it is asked to
            seconds = part.get(wait) if isinstance(part, dict) else None
            if isinstance(seconds, (int, float)) and 0.01 < seconds <= LONGEST_WAIT:
                part[wait] = 0.01
    case.call_and_validate(base_url=server.url, checks=CHECKS, timeout=60)
