"""One call of an engine of ours between its plan and its span.

Called by: the door, which makes and uses it. Test alone: `pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agl_ray.gateway.attempts import Live
from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest
from agl_ray.gateway.limits import Admission
from agl_ray.gateway.overlong import Cut
from agl_ray.gateway.roles import EngineRole
from agl_ray.gateway.session import Plan
from agl_ray.gateway.visible import Reading
from agl_ray.spans import ROLE_KIND


@dataclass
class Open:
    """See the module's text."""

    path: CallPath
    admission: Admission
    role: EngineRole
    request: CallRequest
    sampling: dict[str, Any]
    plan: Plan
    cut: Cut | None
    structure: dict[str, Any] | None
    reading: Reading
    call_id: str
    started_ns: int
    deadline: float  # on the loop's clock
    timings: dict[str, float]

    @property
    def live(self) -> Live:
        return self.admission.live

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        return self.started_ns // 1_000_000_000

    def notes(self) -> dict[str, Any]:
        """What its span says beside the call: whether it is trained, what was cut."""
        role = {} if self.role.trained else {ROLE_KIND: self.role.kind}
        return role if self.cut is None else {**role, "agl.overlong": self.cut.noted()}
