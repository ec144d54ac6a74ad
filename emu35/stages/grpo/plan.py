"""Which prompts come when: tasks mixed by their ratios, each in shuffled epochs of its own.

The plan is a pure function of (seed, tasks, how many prompts were taken): every rank computes the
same one, whatever the layout, and a restored plan goes on where it stood.

Tasks take turns by Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32,
1980): after n prompts, a task of share s has given between s n - (1 - 1/(2k - 2)) and s n +
(1 - 1/(2k - 2)) of them with k tasks. No count is ever off by a whole prompt, in a batch, over
steps, or over batches of changing size. (The task that lags furthest, the obvious rule, may be off
by more.) Shares are fractions, so that nothing rounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from emu35.data.order import Ints, permutation
from emu35.errors import CheckpointError
from emu35.stages.grpo.prompts import TaskPrompt, fingerprint

_STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPrompt:
    """A prompt and when it comes: ``serial`` is its number among all prompts of the run (from 0),
    ``epoch`` how often its task had been gone through before."""

    prompt: TaskPrompt
    serial: int
    epoch: int


class PromptPlan:
    """Gives the prompts of a run one after the other.

    Args:
        tasks: the prompts of every task.
        ratios: share of each task in every batch, in any unit; a task with 0 never comes.
        seed: of the order within tasks, which depends on nothing else but task and epoch.
    """

    def __init__(
        self, tasks: Mapping[str, Sequence[TaskPrompt]], *, ratios: Mapping[str, float], seed: int
    ) -> None:
        assert tasks.keys() == ratios.keys()
        total = sum(map(Fraction, ratios.values()))
        assert total > 0
        assert all(tasks[name] for name, ratio in ratios.items() if ratio > 0)
        self._tasks = tasks
        self._ratios = {name: float(ratio) for name, ratio in ratios.items()}
        self._shares = {name: Fraction(ratio) / total for name, ratio in ratios.items() if ratio}
        self._seed = seed
        self._fingerprints = {name: fingerprint(tasks[name]) for name in self._shares}
        self._given = dict.fromkeys(self._shares, 0)
        self._orders: dict[str, tuple[int, Ints]] = {}

    def take(self, count: int) -> list[PlannedPrompt]:
        """The next ``count`` prompts: those of a step, or more of them in the same step."""
        return [self._next() for _ in range(count)]

    def _next(self) -> PlannedPrompt:
        serial = sum(self._given.values())
        name = self._next_task(serial)
        prompts = self._tasks[name]
        epoch, position = divmod(self._given[name], len(prompts))
        self._given[name] += 1
        number = int(self._order(name, epoch=epoch)[position])
        return PlannedPrompt(prompt=prompts[number], serial=serial, epoch=epoch)

    def _next_task(self, given: int) -> str:
        """Of the tasks that may give without running ahead too far, the one that must soonest."""
        count = len(self._shares)
        if count == 1:
            return next(iter(self._shares))
        least = Fraction(1, 2 * count - 2)
        lags = {
            name: share * (given + 1) - self._given[name] for name, share in self._shares.items()
        }
        may = [name for name, lag in lags.items() if lag >= least]
        return min(may, key=lambda name: (1 - least - lags[name]) / self._shares[name])

    def _order(self, name: str, *, epoch: int) -> Ints:
        kept = self._orders.get(name)
        if kept is None or kept[0] != epoch:
            key = f"{self._seed}/{name}/{epoch}"
            kept = self._orders[name] = (epoch, permutation(len(self._tasks[name]), key=key))
        return kept[1]

    def state_dict(self) -> dict[str, Any]:
        """The place, as JSON, and what it is a place in."""
        return {
            "version": _STATE_VERSION,
            "seed": self._seed,
            "tasks": {
                name: {
                    "given": self._given[name],
                    "ratio": self._ratios[name],
                    "prompts": len(self._tasks[name]),
                    "fingerprint": self._fingerprints[name],
                }
                for name in self._shares
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            CheckpointError: naming all that differs from what the place was saved in.
        """
        if changes := self._changes(state):
            raise CheckpointError(
                "the place among the prompts cannot be restored, since the prompts are not those "
                f"it was saved with: {'; '.join(changes)}. Put them back, or start another run "
                "with stage.init_from naming this one"
            )
        self._given = {name: int(state["tasks"][name]["given"]) for name in self._shares}

    def _changes(self, state: Mapping[str, Any]) -> list[str]:
        """What differs, as clauses."""
        changes = [
            f"{name} was {state.get(name)} and is {value}"
            for name, value in (("version", _STATE_VERSION), ("seed", self._seed))
            if state.get(name) != value
        ]
        saved: Mapping[str, Any] = state.get("tasks", {})
        if saved.keys() != self._shares.keys():
            changes.append(f"tasks were {sorted(saved)} and are {sorted(self._shares)}")
        for name in sorted(saved.keys() & self._shares.keys()):
            entry, ratio = saved[name], self._ratios[name]
            if entry["fingerprint"] != self._fingerprints[name]:
                changes.append(
                    f"the file of task {name} changed ({entry['prompts']} prompts then, "
                    f"{len(self._tasks[name])} now)"
                )
            if entry["ratio"] != ratio:
                changes.append(f"the ratio of task {name} was {entry['ratio']} and is {ratio}")
        return changes
