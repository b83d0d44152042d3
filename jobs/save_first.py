"""A checkpoint before Ray ends a worker group for a reason that is known beforehand."""

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState

from jobs.stopping import PREEMPTED, RESIZED, StopFile

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.controller.state import TrainControllerState
    from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus


class SaveFirst(WorkerGroupCallback, ControllerCallback):
    """Asks training to save and stop when a node of its drains (a preemption notice, an autoscaler,
    `ray start` that got SIGTERM) and before an elastic resize; Ray by itself would lose the steps
    since the last checkpoint. Lives in Ray Train's controller.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.stop, self.seconds = StopFile(folder), seconds
        self.asked = False

    def after_worker_group_poll_status(self, worker_group_status: "WorkerGroupPollStatus") -> None:
        if not self.asked and worker_group_status.get_preemption_info() is not None:
            with suppress(OSError):  # storage that is away; the next poll tries again
                self.stop.ask(PREEMPTED)
                self.asked = True

    def after_controller_state_update(
        self, previous_state: "TrainControllerState", current_state: "TrainControllerState"
    ) -> None:
        if current_state is previous_state:
            time.sleep(0.5)  # no room for the fewest workers: Ray would ask without a pause
        if isinstance(current_state, ResizingState):
            with suppress(OSError):  # storage that is away: the steps since the last are lost
                self.stop.ask(RESIZED)
                if not self.stop.wait(self.seconds):  # it has just finished, or is evaluating
                    self.stop.withdraw()
