"""A cluster of two nodes, one of which is removed while it produces spans; prints what the store says of its attempts (JSON).

Run by tests/faults/test_store_lost_node.py as `python lost_node.py FOLDER`: it needs a Ray of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.store import create_store
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.types import EndReason, EnqueueRolloutRequest

SPANS = 4  # of an attempt; half of them reach the store
ROLLOUTS = 3
MEMORY = 80 * 2**20


def spans(key: tuple[str, str], numbers: range) -> Any:
    row: dict[str, Any] = {"rollout_id": key[0], "attempt_id": key[1], "name": "n", "kind": "span"}
    row |= {"start_ns": 1, "end_ns": 2, "status": "OK"}
    return span_batch([{**row, "span_id": f"{key[1]}-{number}"} for number in numbers])


class Producer:
    """On the node that goes: half of its spans are journalled, half are in its node's memory."""

    async def begin(self, store: LightningStore) -> list[tuple[str, str]]:
        taken = await store.dequeue_many_rollouts(limit=ROLLOUTS, worker_id="away")
        keys = [(one.rollout_id, one.attempt_id) for one in taken]
        for key in keys:
            await store.add_spans(*key, spans(key, range(SPANS // 2)))
        self.held = [ray.put(spans(key, range(SPANS // 2, SPANS))) for key in keys]
        return keys

    async def live(self) -> None:
        await asyncio.Event().wait()


async def work(store: LightningStore, cluster: Cluster, node: Any) -> dict[str, Any]:
    wanted = [EnqueueRolloutRequest(input=i) for i in range(ROLLOUTS)]
    await store.enqueue_many_rollouts(wanted)
    producer = ray.remote(Producer).options(num_cpus=0, resources={"away": 1}).remote()
    keys = await producer.begin.remote(store)
    living = producer.live.remote()
    # The first attempt's end is told by somebody else, who knows how many spans were sent.
    ending = asyncio.create_task(
        store.end_attempt(*keys[0], EndReason.OK, reward=1.0, expected_spans=SPANS)
    )
    await asyncio.to_thread(cluster.remove_node, node, allow_graceful=False)
    try:
        await living
    except ray.exceptions.RayActorError as error:
        told = str(error)
    else:
        raise AssertionError("the producer outlived its node")
    ended = await ending
    lost = await store.worker_lost("away", "its node is gone")
    held = [(one.num_spans, str(one.end_reason), one.error) for one in [ended, *lost]]
    again = await store.dequeue_many_rollouts(limit=10, worker_id="here", wait_seconds=50)
    for one in again:
        key = (one.rollout_id, one.attempt_id)
        await store.add_spans(*key, spans(key, range(SPANS)))
        await store.end_attempt(*key, EndReason.OK, reward=0.5, expected_spans=SPANS)
    rollouts = {}
    for rollout_id, attempt_id in keys:
        tries = (await store.query_attempts(rollout_id)).items
        rows = await store.query_span_rows(rollout_id, attempt_id)
        found = await store.get_rollout_by_id(rollout_id)
        assert found is not None
        rollouts[rollout_id] = {
            "status": found.status.value,
            "tries": [(str(one.end_reason), one.num_spans, one.reward) for one in tries],
            "stored": [row["span_id"].rpartition("-")[2] for row in rows],
        }
    return {"ended": held, "told": told, "rollouts": rollouts}


def main(folder: str) -> None:
    common = {"object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "temp_dir": f"{folder}/ray", **common}
    )
    try:
        node = cluster.add_node(num_cpus=1, resources={"away": 1}, object_store_memory=MEMORY)
        ray.init(address=cluster.address, log_to_driver=False)
        store = create_store("store", "ns", f"sqlite:///{folder}/store.db")
        print(json.dumps(asyncio.run(work(store, cluster, node))))
        asyncio.run(store.shutdown())
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
