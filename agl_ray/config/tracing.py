"""Section `tracing`: what the agent's process records by itself, beside the model calls that the gateway records."""

from __future__ import annotations

from typing import Literal

from agl_ray.config.section import Section


class TracingConfig(Section):
    instrument: list[str] | Literal["auto", "off"] = "auto"
    """Instrumentors that make libraries of the agent write OpenTelemetry spans: entry points or packages (`openai`,
    `openinference-instrumentation-langchain`), which must be installed; `auto`: all that are installed of
    opentelemetry-instrumentation-genai-* and openinference-instrumentation-*; `off`: none. Spans that the agent makes itself, or that a
    framework makes natively, are recorded in any case."""
