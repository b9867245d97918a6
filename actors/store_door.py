"""The store's HTTP doors inside a run: a Ray Serve ingress beside the gateway's.

Called by: the driver's session, for `serve.run(..., route_prefix="/v1")`. Thin: the doors are `agl_ray/store/doors/app.py`; here they
get the store actor. Test alone: `pytest tests/integration/test_store_door.py` (a real Serve).
"""

from __future__ import annotations

from typing import Any

from agl_ray.store import LightningStore
from agl_ray.store.doors.app import store_app
from agl_ray.store.doors.asgi import App

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
