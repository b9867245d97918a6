"""A child process of the engine dies with its parent, also when the parent is killed by `kill -9`. No vLLM and no Ray (which may clean up itself)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

PARENT = """
import multiprocessing, time
from agl_ray.weights import vllm_plugin

def child(ready):
    vllm_plugin._die_with_parent()
    vllm_plugin._die_with_parent()  # vLLM may load plug-ins twice
    ready.send(True)
    time.sleep(600)

if __name__ == "__main__":
    vllm_plugin._die_with_parent()  # not a child of multiprocessing: nothing to watch
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(there,))
    process.start()
    here.recv()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_a_child_dies_with_a_killed_parent(tmp_path: object) -> None:
    script = f"{tmp_path}/parent.py"
    with open(script, "w") as file:
        file.write(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
