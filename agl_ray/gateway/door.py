"""The front door without HTTP: the life of one model call.

    caller's request -> its role (roles.py) and what its attempt may still ask for (limits.py)
        -> a model outside (outside.py), or:
        -> session of (rollout, attempt, role) -> sampling parameters -> exact prompt ids (session.py, overlong.py) -> engine (deadline, retries) -> what the caller sees (text, tool calls) -> call span in the store, acknowledged -> answer

Called by: `agl_ray/gateway/http.py`, one Door per gateway process, one event loop. The engine is any object with the
methods of `EngineClient`; sessions are kept by attempts.py. Test alone: `pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from agl_ray.gateway.attempts import Attempts, Live, StoreClient
from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.constrained import allowed, structure
from agl_ray.gateway.engine_api import GenerateRequest, GenerateResult, join_chunks
from agl_ray.gateway.limits import TOO_MANY_CALLS, TOO_MANY_TOKENS, Admission, Limits
from agl_ray.gateway.open_call import Open
from agl_ray.gateway.outside import OutsideCall
from agl_ray.gateway.overlong import Overlong, fit
from agl_ray.gateway.raw_prompts import plan_raw
from agl_ray.gateway.record import call_span
from agl_ray.gateway.render import Optioned, Renderer
from agl_ray.gateway.roles import EngineClient, EngineLost, EngineRole, OutsideRole, Roles
from agl_ray.gateway.rules import OVERLONG, check_request, room, template_options
from agl_ray.gateway.sampling import check, merge
from agl_ray.gateway.session import Plan, Session
from agl_ray.gateway.visible import Reading, Visible, visible_message
from agl_ray.spans import new_span_id
from agl_ray.types import EngineError, InputError, WaitTimeout
from agl_ray.waits import wait

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5  # pause before a call that lost its engine is sent to another


_RECORDED = (TOO_MANY_CALLS, TOO_MANY_TOKENS, OVERLONG)  # codes of refusals that have a span


@dataclass(frozen=True, kw_only=True)
class DoorSettings:
    """max_model_len: tokens of prompt and response; call_timeout_seconds: one call, holds and retries included;
    store_timeout_seconds: one store operation; idle_seconds: after which a session is forgotten; overlong: see overlong.py; limits: of
    one attempt; allow_constrained: see constrained.py."""

    max_model_len: int
    call_timeout_seconds: float = 60.0
    store_timeout_seconds: float = 60.0
    idle_seconds: float = 900.0
    overlong: Overlong = "error"
    limits: Limits = field(default_factory=Limits)
    allow_constrained: bool = False


class Door:
    """See the module's text. engine, renderer: of the calls without a role, which are refused where `engine` is None; roles: the others. `now` is the clock of idle sessions
    (seconds), for tests."""

    def __init__(
        self,
        store: StoreClient,
        engine: EngineClient | None,
        renderer: Renderer,
        settings: DoorSettings,
        now: Callable[[], float] = time.monotonic,
        roles: Mapping[str, EngineRole | OutsideRole] | None = None,
    ) -> None:
        self._settings = settings
        self._roles = Roles(None if engine is None else EngineRole(engine, renderer), roles)
        self.attempts = Attempts(store, settings.store_timeout_seconds, settings.idle_seconds, now)

    # ---- the calls ----

    async def call(self, path: CallPath, request: CallRequest) -> CallResult:
        """Answer a call whole. Refusal for anything the caller is to be told; its span is in the store when this returns."""
        async with self._opened(path) as live:
            role = self._roles.of(path.role)
            with self._settings.limits.admitted(live) as admission:
                if isinstance(role, OutsideRole):
                    return await (await self._outside(path, admission, role, request)).whole()
                call = await self._begin(path, admission, role, request)
                try:
                    answer = await self._generate(call)
                except (EngineError, WaitTimeout, InputError) as error:
                    raise await self._failed(call, error) from error
                return await self._finish(call, answer, None)

    async def call_stream(
        self, path: CallPath, request: CallRequest
    ) -> AsyncGenerator[Streamed | CallResult, None]:
        """As `call`: pieces as they become certain, then the CallResult, which comes when the span is in the store."""
        async with self._opened(path) as live:
            role = self._roles.of(path.role)
            with self._settings.limits.admitted(live) as admission:
                if isinstance(role, OutsideRole):
                    stream = (await self._outside(path, admission, role, request)).stream()
                else:
                    stream = self._answers(await self._begin(path, admission, role, request))
                async with aclosing(stream) as pieces:
                    async for piece in pieces:
                        yield piece

    async def count(self, path: CallPath, request: CallRequest) -> int:
        """Prompt tokens that this call would have; nothing is recorded."""
        async with self._opened(path) as live:
            role = self._roles.of(path.role)
            if isinstance(role, OutsideRole):
                raise Refusal(
                    400,
                    f"role {path.role} is answered by a model outside, whose tokens cannot be counted here",
                    param="role",
                    code="unsupported_parameter",
                )
            request = await self._checked(path, live, role, request)
            return len(self._plan(path, live, role, request).prompt_ids)

    async def model(self, path: CallPath) -> str:
        """The model name that calls of this path must ask for."""
        async with self._opened(path) as live:
            role = self._roles.of(path.role)
            return role.upstream.model if isinstance(role, OutsideRole) else live.llm.model

    async def state(self, path: CallPath) -> dict[str, Any]:
        """See `Attempts.state`."""
        return await self.attempts.state(path)

    # ---- one call ----

    @asynccontextmanager
    async def _opened(self, path: CallPath) -> AsyncIterator[Live]:
        """The attempt of a call, while it is open; what a policy refuses is recorded."""
        live = await self.attempts.open(path)
        try:
            yield live
        except (asyncio.CancelledError, GeneratorExit):
            live.disconnects += 1
            raise
        except Refusal as refusal:
            if refusal.code in _RECORDED:
                await self.attempts.refused(path, live, refusal)
            raise
        finally:
            live.open_calls -= 1

    async def _outside(
        self, path: CallPath, admission: Admission, role: OutsideRole, request: CallRequest
    ) -> OutsideCall:
        return await OutsideCall.begin(
            self.attempts,
            role.upstream,
            path,
            admission,
            request,
            seconds=self._settings.call_timeout_seconds,
            tokens_left=self._settings.limits.tokens_left(admission.live),
        )

    async def _checked(
        self, path: CallPath, live: Live, role: EngineRole, request: CallRequest
    ) -> CallRequest:
        """The request, if the attempt may make it, with the conversation that it goes on."""
        check_request(request, live.llm.model, role.renderer)
        if request.previous is None:
            return request
        return await self.attempts.continued(path, live, request)

    def _plan(self, path: CallPath, live: Live, role: EngineRole, request: CallRequest) -> Plan:
        session = live.sessions.setdefault(path.role, Session())
        if request.prompt is not None:
            return plan_raw(session, request.prompt, role.renderer)
        options = template_options(request, role.renderer)
        text_model = Optioned(role.renderer, options) if options else role.renderer
        return session.plan(request.messages, request.tools, text_model)

    async def _begin(
        self, path: CallPath, admission: Admission, role: EngineRole, request: CallRequest
    ) -> Open:
        """Check the request against the attempt and work out the exact prompt."""
        started = time.perf_counter()
        settings, live = self._settings, admission.live
        request = await self._checked(path, live, role, request)
        sampling = merge(request.sampling, live.rollout, live.llm, live.drawn)
        check(sampling, live.rollout.mode if role.trained else None)
        if role.trained:
            allowed(request, live.rollout, settings.allow_constrained)
        structured = structure(request, role.renderer)
        wanted = _least(sampling.get("max_tokens"), settings.limits.tokens_left(live))
        plan, cut = fit(
            self._plan(path, live, role, request),
            settings.overlong,
            settings.max_model_len,
            wanted,
            role.mark if request.prompt is None else (),
        )
        sampling["max_tokens"] = room(settings.max_model_len, request, plan, wanted)
        over = request.prompt is not None or role.renderer.thoughts_over(plan.prompt_ids)
        live.drawn += 1
        return Open(
            path=path,
            admission=admission,
            role=role,
            request=request,
            sampling=sampling,
            plan=plan,
            cut=cut,
            structure=structured,
            reading=Reading(role.renderer, request, over, sampling.get("stop", [])),
            call_id=new_span_id(),
            started_ns=time.time_ns(),
            deadline=asyncio.get_running_loop().time() + settings.call_timeout_seconds,
            timings={"prepare": time.perf_counter() - started},
        )

    def _engine_request(self, call: Open, number: int) -> GenerateRequest:
        return GenerateRequest(
            request_id=call.call_id if number == 0 else f"{call.call_id}-{number}",
            prompt_ids=call.plan.prompt_ids,
            structure=call.structure,
            adapter=call.role.adapter,
            session=call.path.rollout_id,
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
                    call.role.engine.generate(self._engine_request(call, number)),
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

    async def _answers(self, call: Open) -> AsyncGenerator[Streamed | CallResult, None]:
        """What `call_stream` gives of an engine's answer."""
        yield Streamed(call_id=call.call_id, created=call.created, prompt_ids=call.plan.prompt_ids)
        visible = Visible(call.reading)
        try:
            async with aclosing(self._stream(call, visible)) as pieces:
                async for piece in pieces:
                    yield piece
        except (EngineError, WaitTimeout, InputError) as error:
            raise await self._failed(call, error) from error
        result = await self._finish(call, join_chunks(visible.chunks), visible)
        yield visible.rest(result.reasoning, result.content)
        yield result

    async def _stream(self, call: Open, visible: Visible) -> AsyncGenerator[Streamed, None]:
        """Pieces of a streamed answer. Until the caller has seen any of it, a lost engine is replaced as in `_generate`."""
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            stream = call.role.engine.generate_stream(self._engine_request(call, number))
            try:
                async with aclosing(stream) as chunks:
                    while True:
                        chunk = await wait(
                            anext(chunks, None),
                            on=f"the engine's next tokens for call {call.call_id} of {call.path}",
                            seconds=max(call.deadline - loop.time(), 0.0),
                            hint="gateway.call_timeout_seconds",
                        )
                        _if_cancelled()
                        if chunk is None:
                            break
                        yield visible.push(chunk)
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
        stop_id = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
        result = self._read(call, answer, visible)
        body_text, end_text = call.role.renderer.split(answer.response_ids, stop_id)
        call.timings["engine"] = (time.time_ns() - call.started_ns) / 1e9
        call.timings["read"] = time.perf_counter() - started
        batch = call_span(
            path=call.path,
            request=call.request,
            sampling=call.sampling,
            result=result,
            plan=call.plan,
            body_text=body_text,
            end_text=end_text,
            start_ns=call.started_ns,
            end_ns=time.time_ns(),
            timings=call.timings,
            notes=call.notes(),
        )
        await self.attempts.journal(call.path, call.live, batch, call.call_id)
        await self.attempts.answered(call.path, call.live, call.started_ns)
        session = call.live.sessions[call.path.role]
        session.add(
            call.plan, call.call_id, answer.response_ids, body_text, end_text, result.message()
        )
        if call.request.keep:
            call.live.keep(call.path.role, call.call_id, call.request, result)
        call.admission.answered()
        call.live.counts["response_tokens"] += len(answer.response_ids)
        call.live.counts["cached_tokens"] += answer.cached_tokens
        call.live.counts["retokenized_tokens"] += call.plan.retokenized
        call.live.counts["branches"] += call.plan.branch_reason is not None
        call.live.counts["overlong_cuts"] += call.cut is not None
        return result

    def _read(self, call: Open, answer: GenerateResult, visible: Visible | None) -> CallResult:
        """The engine's answer as the caller is to see it."""
        message = visible_message(call.reading, answer, visible)
        thoughts = call.role.renderer.thoughts
        counted = thoughts.count(answer.response_ids) if thoughts and message.reasoning else 0
        stopped_by = answer.stop_reason if isinstance(answer.stop_reason, str) else None
        return CallResult(
            call_id=call.call_id,
            created=call.created,
            reasoning=message.reasoning,
            reasoning_tokens=counted,
            content=message.content,
            tool_calls=message.tool_calls,
            finish_reason=answer.finish_reason,
            stop_string=stopped_by if answer.finish_reason == "stop" else None,
            prompt_ids=call.plan.prompt_ids,
            response_ids=answer.response_ids,
            logprobs=answer.logprobs,
            weight_versions=answer.weight_versions,
            cached_tokens=answer.cached_tokens,
        )

    async def _failed(self, call: Open, error: Exception) -> Refusal:
        """The refusal to give for a call without an answer, which is counted and recorded."""
        if isinstance(error, InputError):
            return Refusal(400, str(error), code="invalid_value")
        return await self.attempts.failed(
            call.path, call.live, call.call_id, call.started_ns, error
        )


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _if_cancelled() -> None:
    """Raise a cancellation that was lost: `asyncio.wait_for` of Python 3.11 forgets one that comes together with the result it waits
    for, and in a busy process the next tokens are always there. Without this, a stream whose caller has left would go on to its end."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
