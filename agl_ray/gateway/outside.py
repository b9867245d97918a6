"""The life of a call that a model outside answers: checked, sent on, recorded, answered.

Called by: the door, for roles of kind `endpoint`. The conversation is passed on as it is; there are no token ids, so there is no session.
Test alone: `pytest tests/unit/test_gateway_upstream.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from agl_ray.gateway.attempts import Attempts
from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.limits import Admission
from agl_ray.gateway.record import outside_span
from agl_ray.gateway.upstream import Outside, Upstream
from agl_ray.spans import new_span_id
from agl_ray.types import EngineError, WaitTimeout


@dataclass
class OutsideCall:
    """One call. `deadline` is on the loop's clock."""

    attempts: Attempts
    upstream: Upstream
    path: CallPath
    admission: Admission
    request: CallRequest
    deadline: float
    call_id: str
    started_ns: int

    @classmethod
    async def begin(
        cls,
        attempts: Attempts,
        upstream: Upstream,
        path: CallPath,
        admission: Admission,
        request: CallRequest,
        *,
        seconds: float,
        tokens_left: int | None,
    ) -> OutsideCall:
        """Refusal for what an endpoint cannot be asked for. seconds: the call's deadline; tokens_left: most response tokens."""
        _check(request, upstream.model)
        if request.previous is not None:
            request = await attempts.continued(path, admission.live, request)
        if tokens_left is not None:
            wanted = request.sampling.get("max_tokens") or tokens_left
            sampling = {**request.sampling, "max_tokens": min(wanted, tokens_left)}
            request = msgspec.structs.replace(request, sampling=sampling)
        deadline = asyncio.get_running_loop().time() + seconds
        started = time.time_ns()
        return cls(attempts, upstream, path, admission, request, deadline, new_span_id(), started)

    async def whole(self) -> CallResult:
        """The answer, when its span is in the store."""
        try:
            answer = await self.upstream.whole(self.request, self.deadline)
        except (EngineError, WaitTimeout) as error:
            raise await self._failed(error) from error
        return await self._finish(answer)

    async def stream(self) -> AsyncGenerator[Streamed | CallResult, None]:
        """As the door's `call_stream`."""
        yield Streamed(call_id=self.call_id, created=self.started_ns // 1_000_000_000)
        answer: Outside | None = None
        try:
            async with aclosing(self.upstream.stream(self.request, self.deadline)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Outside):
                        answer = piece
                        break
                    yield Streamed(text=piece.text, reasoning=piece.reasoning)
            if answer is None:
                raise EngineError("the endpoint's stream ended without an answer")
        except (EngineError, WaitTimeout) as error:
            raise await self._failed(error) from error
        yield await self._finish(answer)

    async def _finish(self, answer: Outside) -> CallResult:
        path, live = self.path, self.admission.live
        result = CallResult(
            call_id=self.call_id,
            created=self.started_ns // 1_000_000_000,
            content=answer.content,
            reasoning=answer.reasoning,
            reasoning_tokens=answer.reasoning_tokens,
            tool_calls=answer.tool_calls if self.request.parallel else answer.tool_calls[:1],
            finish_reason=answer.finish_reason,
            stop_string=answer.stop_string,
            prompt_ids=[],
            response_ids=[],
            logprobs=[],
            weight_versions=[],
            cached_tokens=answer.cached_tokens,
            used=(answer.prompt_tokens or 0, answer.response_tokens or 0),
        )
        settings = self.upstream.settings
        batch = outside_span(
            path=path,
            request=self.request,
            result=result,
            endpoint={"url": settings.base_url, "model": settings.model, "answered": answer.model},
            start_ns=self.started_ns,
            end_ns=time.time_ns(),
        )
        await self.attempts.journal(path, live, batch, self.call_id)
        await self.attempts.answered(path, live, self.started_ns)
        if self.request.keep:
            live.keep(path.role, self.call_id, self.request, result)
        self.admission.answered()
        live.counts["outside_calls"] += 1
        live.counts["response_tokens"] += result.num_response
        return result

    async def _failed(self, error: Exception) -> Refusal:
        return await self.attempts.failed(
            self.path, self.admission.live, self.call_id, self.started_ns, error
        )


def _check(request: CallRequest, model: str) -> None:
    """Refusal for another model, and for what only token ids could answer."""
    if request.model != model:
        raise Refusal(
            404,
            f"model: expected {model!r}, got {request.model!r}",
            param="model",
            code="model_not_found",
        )
    asked = {
        "prompt": request.prompt is not None,
        "logprobs": request.logprobs,
        "return_token_ids": request.return_token_ids,
    }
    for field, given in asked.items():
        if given:
            raise Refusal(
                400,
                f"{field}: this role is answered by a model outside, which is asked for chat answers and gives no token ids; leave it out",
                param=field,
                code="unsupported_parameter",
            )
