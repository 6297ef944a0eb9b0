"""Ray's trainer, as a run needs it: without what it does not use, and off nodes that will go."""

from collections.abc import Callable, Collection
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.failure_handling import FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    ScalingDecision,
)
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from heliostat.train.avoided import list_resources


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Without two actors that Ray starts, each for a second of two cores: one manages data sets
    that are passed to Ray, one cleans up after a dead controller, as the end of the job does.

    `failures` decides what follows the end of the workers, `allotted` says how many there may be,
    None if nobody has said it. None of them is on an `avoided` node.
    """

    def __init__(
        self,
        *args: Any,
        failures: FailurePolicy,
        allotted: Callable[[], int | None],
        avoided: Collection[str] = (),
        **options: Any,
    ) -> None:
        self._failures, self._allotted, self._avoided = failures, allotted, avoided
        super().__init__(*args, **options)

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, idle)
        ]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["failure_policy"] = self._failures
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = _StayingNodes(
                self.scaling_config, self._allotted, self._avoided
            )
        return super()._initialize_and_run_controller(**options)


def find_scratch() -> str:
    """A folder for the empty file that Ray Train leaves of a run, by default in the user's home."""
    return f"{ray._private.worker._global_node.get_session_dir_path()}/train"


class _StayingNodes(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray itself counts on a draining node for as long as it lives, but places no worker there: a
    run that was told to leave would wait for that node until its end. Nor does it heed a label
    selector when it reserves, so with `avoided` nodes all that the others have counts as reserved.

    Of the nodes that stay it asks for and takes no more than was allotted.
    """

    def __init__(
        self,
        scaling: ScalingConfig,
        allotted: Callable[[], int | None],
        avoided: Collection[str],
    ) -> None:
        super().__init__(scaling)
        self._allotted, self._avoided = allotted, avoided

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        if self._allotted() == 0:  # Ray would look for ever whether there are enough nodes
            raise RuntimeError("the run has given all its workers back")
        return super().make_decision_for_non_running_worker_group()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._cap(super()._get_num_workers_for_resource_request())

    def _cap(self, workers: int) -> int:
        allotted = self._allotted()
        return workers if allotted is None else min(workers, allotted)

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        draining = ray._private.state.state.get_draining_nodes()
        if self._avoided and reserved_resources:
            reserved_resources = list_resources(self._avoided)
        staying = {
            node: resources
            for node, resources in reserved_resources.items()
            if node not in draining
        }
        return self._cap(super()._count_possible_workers(staying))


class _Meeting(Backend):  # type: ignore[misc]
    """Workers meet by themselves in `worker`; on a node each sees the GPUs of all, as NCCL wants.

    Ray's own `TorchConfig` imports PyTorch in the driver and the controller, which have no use for
    it before the first step.
    """

    share_cuda_visible_devices = True


class MeetingConfig(BackendConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting
