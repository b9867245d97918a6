"""The front door without HTTP: the life of one model call.

    caller's request -> session of (rollout, attempt, role) -> sampling parameters -> exact prompt ids (session.py)
        -> engine (deadline, retries) -> what the caller sees (text, tool calls) -> call span in the store, acknowledged -> answer

Called by: `agl_ray/gateway/http.py`, one Door per gateway process, one event loop. The engine is any object with the
methods of `EngineClient`; sessions are kept by attempts.py. Test alone: `pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from agl_ray.gateway.attempts import Attempts, CallPath, Live, StoreClient
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult, join_chunks
from agl_ray.gateway.record import call_span, failed_call_span
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.sampling import check, merge
from agl_ray.gateway.session import Plan, Session
from agl_ray.gateway.visible import Visible, visible_message, visible_text
from agl_ray.spans import new_span_id
from agl_ray.types import EngineError, InputError, WaitTimeout
from agl_ray.waits import wait

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5  # pause before a call that lost its engine is sent to another


class EngineLost(EngineError):
    """The engine replica died or could not be reached: the same call may be sent to another one."""


class EngineClient(Protocol):
    """The engine as the door sees it. Cancelling either call aborts it in the engine."""

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    def generate_stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]: ...


@dataclass(frozen=True, kw_only=True)
class DoorSettings:
    """max_model_len: tokens of prompt and response; call_timeout_seconds: one call, holds and retries included;
    store_timeout_seconds: one store operation; idle_seconds: after which a session is forgotten."""

    max_model_len: int
    call_timeout_seconds: float = 60.0
    store_timeout_seconds: float = 60.0
    idle_seconds: float = 900.0


@dataclass
class Open:
    """One call between its plan and its span."""

    path: CallPath
    live: Live
    request: CallRequest
    sampling: dict[str, Any]
    plan: Plan
    call_id: str
    started_ns: int
    deadline: float  # on the loop's clock
    timings: dict[str, float]

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        return self.started_ns // 1_000_000_000


class Door:
    """See the module's text. `now` is the clock of idle sessions (seconds), for tests."""

    def __init__(
        self,
        store: StoreClient,
        engine: EngineClient,
        renderer: Renderer,
        settings: DoorSettings,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._renderer, self._settings = engine, renderer, settings
        self.attempts = Attempts(store, settings.store_timeout_seconds, settings.idle_seconds, now)

    # ---- the calls ----

    async def chat(self, path: CallPath, request: CallRequest) -> CallResult:
        """Answer a call whole. Refusal for anything the caller is to be told; its span is in the store when this returns."""
        live = await self.attempts.open(path)
        try:
            call = self._begin(path, live, request)
            try:
                answer = await self._generate(call)
            except (EngineError, WaitTimeout, InputError) as error:
                raise await self._failed(call, error) from error
            return await self._finish(call, answer, None)
        except asyncio.CancelledError:
            live.disconnects += 1
            raise
        finally:
            live.open_calls -= 1

    async def chat_stream(
        self, path: CallPath, request: CallRequest
    ) -> AsyncGenerator[Streamed | CallResult, None]:
        """As `chat`: pieces as they become certain, then the CallResult, which comes when the span is in the store."""
        live = await self.attempts.open(path)
        try:
            call = self._begin(path, live, request)
            yield Streamed(
                call_id=call.call_id, created=call.created, prompt_ids=call.plan.prompt_ids
            )
            visible = Visible(self._renderer, request, call.sampling.get("stop", []))
            try:
                async with aclosing(self._stream(call, visible)) as pieces:
                    async for piece in pieces:
                        yield piece
            except (EngineError, WaitTimeout, InputError) as error:
                raise await self._failed(call, error) from error
            yield await self._finish(call, join_chunks(visible.chunks), visible)
        except (asyncio.CancelledError, GeneratorExit):
            live.disconnects += 1
            raise
        finally:
            live.open_calls -= 1

    async def model(self, path: CallPath) -> str:
        """The model name that calls of this path must ask for."""
        live = await self.attempts.open(path)
        live.open_calls -= 1
        return live.llm.model

    async def state(self, path: CallPath) -> dict[str, Any]:
        """See `Attempts.state`."""
        return await self.attempts.state(path)

    # ---- one call ----

    def _begin(self, path: CallPath, live: Live, request: CallRequest) -> Open:
        """Check the request against the attempt and work out the exact prompt."""
        started = time.perf_counter()
        if request.model != live.llm.model:
            raise Refusal(
                404,
                f"model: expected {live.llm.model!r}, got {request.model!r}",
                param="model",
                code="model_not_found",
            )
        if request.tools and not self._renderer.parses_tools:
            raise Refusal(
                400,
                "tools: this run has no tool-call parser; set engine.tool_parser (hermes for Qwen)",
                param="tools",
                code="unsupported_parameter",
            )
        sampling = merge(request.sampling, live.rollout, live.llm, live.counts["calls"])
        check(sampling, live.rollout.mode)
        session = live.sessions.setdefault(path.role, Session())
        plan = session.plan(request.messages, request.tools, self._renderer)
        sampling["max_tokens"] = self._room(len(plan.prompt_ids), sampling.get("max_tokens"))
        return Open(
            path=path,
            live=live,
            request=request,
            sampling=sampling,
            plan=plan,
            call_id=new_span_id(),
            started_ns=time.time_ns(),
            deadline=asyncio.get_running_loop().time() + self._settings.call_timeout_seconds,
            timings={"prepare": time.perf_counter() - started},
        )

    def _room(self, num_prompt: int, wanted: int | None) -> int:
        """Response tokens: what was asked for, or as many as the context holds; Refusal where the prompt fills it."""
        longest = self._settings.max_model_len
        room = longest - num_prompt
        if room < 1:
            raise Refusal(
                400,
                f"This model's maximum context length is {longest} tokens. However, your messages resulted in "
                f"{num_prompt} tokens. Please reduce the length of the messages.",
                param="messages",
                code="context_length_exceeded",
            )
        return room if wanted is None else min(wanted, room)

    def _engine_request(self, call: Open, number: int) -> GenerateRequest:
        return GenerateRequest(
            request_id=call.call_id if number == 0 else f"{call.call_id}-{number}",
            prompt_ids=call.plan.prompt_ids,
            **{
                key: max(value, 0) if key == "top_k" else value
                for key, value in call.sampling.items()
            },
        )

    async def _generate(self, call: Open) -> GenerateResult:
        """The engine's answer; a lost replica is replaced by another as long as the deadline allows."""
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            left = call.deadline - loop.time()
            try:
                return await wait(
                    self._engine.generate(self._engine_request(call, number)),
                    on=f"the engine's answer to call {call.call_id} of {call.path}",
                    seconds=max(left, 0.0),
                    hint="gateway.call_timeout_seconds",
                )
            except EngineLost as error:
                await self._before_retry(call, error)
                number += 1

    async def _before_retry(self, call: Open, error: EngineLost) -> None:
        left = call.deadline - asyncio.get_running_loop().time()
        if left <= RETRY_SECONDS:
            raise error
        logger.warning(
            "call %s of %s lost its engine and is sent again: %s", call.call_id, call.path, error
        )
        await asyncio.sleep(RETRY_SECONDS)

    async def _stream(self, call: Open, visible: Visible) -> AsyncGenerator[Streamed, None]:
        """Pieces of a streamed answer. Until the caller has seen any of it, a lost engine is replaced as in `_generate`."""
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            stream = self._engine.generate_stream(self._engine_request(call, number))
            try:
                async with aclosing(stream) as chunks:
                    while True:
                        chunk = await wait(
                            anext(chunks, None),
                            on=f"the engine's next tokens for call {call.call_id} of {call.path}",
                            seconds=max(call.deadline - loop.time(), 0.0),
                            hint="gateway.call_timeout_seconds",
                        )
                        if chunk is None:
                            break
                        text, entries = visible.push(chunk)
                        yield Streamed(text=text, token_ids=chunk.response_ids, entries=entries)
                if visible.ended:
                    return
                raise EngineLost(
                    f"the engine's stream of call {call.call_id} ended without a finish reason"
                )
            except EngineLost as error:
                if visible.chunks:
                    raise
                await self._before_retry(call, error)
                number += 1

    async def _finish(
        self, call: Open, answer: GenerateResult, visible: Visible | None
    ) -> CallResult:
        """Read the answer, have its span journalled, remember it; then it may be given to the caller."""
        if answer.finish_reason == "abort":
            raise await self._failed(call, EngineError(f"the engine aborted call {call.call_id}"))
        started = time.perf_counter()
        request = call.request
        stop_id = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
        text = visible_text(self._renderer, answer, keep_special=request.parse_tools)
        sent = visible.sent if visible else ""
        content, tool_calls = visible_message(self._renderer, request, text, sent)
        body_text, end_text = self._renderer.split(answer.response_ids, stop_id)
        result = CallResult(
            call_id=call.call_id,
            created=call.created,
            content=content,
            tool_calls=tool_calls,
            finish_reason=answer.finish_reason,
            prompt_ids=call.plan.prompt_ids,
            response_ids=answer.response_ids,
            logprobs=answer.logprobs,
            weight_versions=answer.weight_versions,
            cached_tokens=answer.cached_tokens,
        )
        call.timings["engine"] = (time.time_ns() - call.started_ns) / 1e9
        call.timings["read"] = time.perf_counter() - started
        batch = call_span(
            rollout_id=call.path.rollout_id,
            attempt_id=call.path.attempt_id,
            role=call.path.role,
            request=request,
            sampling=call.sampling,
            result=result,
            plan=call.plan,
            body_text=body_text,
            end_text=end_text,
            start_ns=call.started_ns,
            end_ns=time.time_ns(),
            timings=call.timings,
        )
        await self.attempts.journal(call.path, call.live, batch, call.call_id)
        await self.attempts.note_unanswered(call.path, call.live, None)
        session = call.live.sessions[call.path.role]
        session.add(
            call.plan, call.call_id, answer.response_ids, body_text, end_text, result.message()
        )
        call.live.counts["calls"] += 1
        call.live.counts["retokenized_tokens"] += call.plan.retokenized
        call.live.counts["branches"] += call.plan.branch_reason is not None
        return result

    async def _failed(self, call: Open, error: Exception) -> Refusal:
        """Count and record a call without an answer; the refusal to give."""
        if isinstance(error, InputError):
            return Refusal(400, str(error), code="invalid_value")
        path, message = call.path, f"call {call.call_id}: {error}"
        call.live.counts["engine_errors"] += 1
        call.live.last_error = message
        batch = failed_call_span(
            rollout_id=path.rollout_id,
            attempt_id=path.attempt_id,
            role=path.role,
            message=message,
            start_ns=call.started_ns,
            end_ns=time.time_ns(),
        )
        await self.attempts.journal(path, call.live, batch, f"{call.call_id}-failed")
        await self.attempts.note_unanswered(path, call.live, message)
        return Refusal(503, message, code="engine_error", kind="server_error")


@dataclass(frozen=True)
class Streamed:
    """A piece of a streamed answer. The first one has the call's id and prompt and nothing else."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    call_id: str | None = None
    created: int = 0  # seconds since the epoch
    prompt_ids: list[int] = field(default_factory=list)
