"""The weight-transfer engine `agl` inside vLLM's worker: applies a received version to the model. Imported by vLLM's factory only.

Test: `pytest tests/integration/test_engine_vllm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from agl_ray.weights.receiver import Receiver


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing to set up: groups are joined per order, by the receiver."""


@dataclass
class Apply(WeightTransferUpdateInfo):
    """Which received version to load."""

    version: int


class AglWeightTransferEngine(WeightTransferEngine[NoInit, Apply]):
    """vLLM calls start, update and finish around one version that `receiver` holds already."""

    init_info_cls = NoInit
    update_info_cls = Apply
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.receiver = Receiver()

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing; see `NoInit`."""

    def start_weight_update(self) -> None:
        """Put the layers into vLLM's reload mode: weights in checkpoint format go through the model's own loaders."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Apply) -> None:
        """Load every tensor of the received version."""
        self.model.load_weights(self.receiver.take(update_info.version))

    def finish_weight_update(self) -> None:
        """Leave reload mode; refresh what vLLM derived from the weights and does not refresh itself."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Leave the group and forget what was received."""
        self.receiver.close()


def _repack_tied_heads(model: Any) -> None:
    # On CPU the head's matrix is packed for the kernel when it is loaded. A head tied to the embedding is never loaded itself, so after an
    # update its packed copy would stay the old one: logprobs wrong by 1 and more, without an error.
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.quant_method is not None:
            module.quant_method.process_weights_after_loading(module)
