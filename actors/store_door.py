"""The store's HTTP doors inside a run: a Ray Serve ingress beside the gateway's.

Called by: the driver's session, for `serve.run(..., route_prefix="/v1")`. Thin: the doors are `agl_ray/store/doors/app.py`; here they
get the store actor. Test alone: `pytest tests/integration/test_store_door.py` (a real Serve).
"""

from __future__ import annotations

import os
from ipaddress import ip_address
from typing import Any

from agl_ray.config import RunConfig
from agl_ray.ops.asgi import App
from agl_ray.store import LightningStore
from agl_ray.store.doors.app import store_app
from agl_ray.types import ConfigError

KEY_VARIABLE = "AGL_STORE_API_KEY"
PREFIX = "/v1"
FACADE_PREFIXES = ("/api", "/proxy")


class StoreDoor:
    """One replica of the doors. Made by Serve; ready when the store is connected."""

    def __init__(self, namespace: str, api_key: str | None, gateway_url: str | None) -> None:
        store = LightningStore.connect(namespace=namespace)
        self._app = store_app(store, api_key=api_key, gateway_url=gateway_url)

    def __serve_build_asgi_app__(self) -> App:
        return self._app


def store_door(
    namespace: str, api_key: str | None = None, *, gateway_url: str | None = None
) -> Any:
    """The bound Serve application of the doors, for `serve.run(..., route_prefix=PREFIX)`.

    The facade of agent-lightning 1.0 has paths of its own: run one more of these per prefix in `FACADE_PREFIXES` where it is wanted.
    `namespace`: where the `store` actor lives. `api_key`: what callers must show; None: nothing. `gateway_url`: root of the gateway, for
    the facade's model calls.
    """
    from ray import serve

    deployment = serve.deployment(
        serve.ingress()(StoreDoor),
        name="StoreDoor",
        num_replicas=1,
        max_ongoing_requests=100_000,  # long polls wait here for hours
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=2.0,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": "1",
                    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
                    "CUDA_VISIBLE_DEVICES": "",
                }
            },
        },
    )
    return deployment.bind(namespace, api_key, gateway_url)


def door_key(config: RunConfig) -> str | None:
    """What callers of the doors must show: AGL_STORE_API_KEY. ConfigError where there is none and the gateway's host can be reached
    from other machines."""
    key = os.environ.get(KEY_VARIABLE) or None
    host = config.gateway.host
    if key is None and not _is_own(host):
        raise ConfigError(
            f"store.door: gateway.host {host} can be reached from other machines and there is no key: set {KEY_VARIABLE}, or "
            "gateway.host=127.0.0.1"
        )
    return key


def _is_own(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False  # a name: whatever it means


def store_doors(namespace: str, api_key: str | None, gateway_url: str) -> list[Any]:
    """The doors as targets of `serve.run_many`, one application per prefix of their paths."""
    from ray import serve

    return [
        serve.RunTarget(
            store_door(namespace, api_key, gateway_url=gateway_url),
            name=f"store_door{prefix.replace('/', '_')}",
            route_prefix=prefix,
        )
        for prefix in (PREFIX, *FACADE_PREFIXES)
    ]
