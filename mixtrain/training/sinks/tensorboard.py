"""TensorBoard: the numbers of every record, in run_dir/tensorboard."""

from __future__ import annotations

from typing import Any

from mixtrain.checkpoint.write_errors import convert_write_errors
from mixtrain.config.plan import Plan
from mixtrain.training.sinks.sink import Sink


class TensorBoard(Sink):
    """Writes each number of a record under its key. Needs logging.tensorboard."""

    writer = None

    @staticmethod
    def wanted(plan: Plan) -> bool:
        return plan.config.logging.tensorboard

    def begin(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with convert_write_errors(self.directory):
            self.writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=step + 1)

    def step(self, record: dict[str, Any]) -> None:
        with convert_write_errors(self.directory / "tensorboard"):
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.writer.add_scalar(name, value, record["step"])

    validation = step

    def close(self) -> None:
        if self.writer:
            self.writer.close()
