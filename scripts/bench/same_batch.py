"""A loader whose every step is the same batch: what is timed is the step alone."""

from emu35.data.batch import Batch


class SameBatch:
    """Stands in for :class:`emu35.data.loader.TokenLoader` where no state is saved."""

    damaged_documents = 0

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next_step(self) -> list[Batch]:
        return [self.batch]

    def counts(self) -> dict[str, float]:
        """Nothing was read, so nothing is counted."""
        return {}
