# SPDX-License-Identifier: Apache-2.0
"""How far a basis is, for people: layers, bytes read, and the time left by what the layers cost."""

from types import TracebackType

from osora.initialisation.layers import SourceLayer
from osora.initialisation.request import InitialisationPlan, job_of


class Progress:
    """A bar on a terminal, or where ``wanted`` says so; layers that other processes make do not move it."""

    def __init__(self, plan: InitialisationPlan, wanted: bool | None) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TimeRemainingColumn())
        counts = (TextColumn("{task.fields[layers]}"), TextColumn("{task.fields[read]}"))
        self.bars = Bars(*columns, *counts, disable=wanted is False, transient=wanted is None)
        if wanted is None and not self.bars.console.is_terminal:
            self.bars.disable = True
        self.plan, self.layers, self.read = plan, 0, 0
        self.task = self.bars.add_task("decomposing", total=plan.flops, layers="", read="")

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def advance(self, layer: SourceLayer) -> None:
        """One layer more is done."""
        self.layers += 1
        self.read += layer.bytes_read
        self.bars.update(
            self.task,
            advance=job_of(layer).flops,
            layers=f"{self.layers} of {len(self.plan.layers)} layers",
            read=f"{self.read / 1e9:.2f} of {self.plan.bytes_read / 1e9:.2f} GB",
        )


__all__ = ["Progress"]
