"""Extents never overlap, never lose what they hold, and give everything back."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emu35.inference.arena import PAGE, Arena, Extent

SLOTS = 20 * PAGE


class ArenaMachine(RuleBasedStateMachine):
    """Owners write their number into every slot they use; moves copy slots as the cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = [0] * SLOTS
        self.arena = Arena(SLOTS, move=self.move)
        self.owned: dict[int, Extent] = {}
        self.owners = 0

    def move(self, source: int, target: int, count: int) -> None:
        self.slots[target : target + count] = self.slots[source : source + count]

    def write(self, owner: int) -> None:
        extent = self.owned[owner]
        extent.used = extent.size
        self.slots[extent.start : extent.start + extent.size] = [owner] * extent.size

    @rule(count=st.integers(0, 8 * PAGE))
    def allocate(self, count: int) -> None:
        free = self.arena.free
        extent = self.arena.allocate(count)
        if extent is None:
            assert -(-max(count, 1) // PAGE) * PAGE > free, "refused, though enough slots are free"
            return
        assert extent.size >= max(count, 1)
        self.owners += 1
        self.owned[self.owners] = extent
        self.write(self.owners)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), more=st.integers(0, 6 * PAGE))
    def grow(self, data: st.DataObject, more: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        extent, free = self.owned[owner], self.arena.free
        needed = extent.size + more
        before = (extent.size, extent.used)
        if self.arena.grow(extent, needed, most=SLOTS):
            assert extent.size >= needed
            self.write(owner)
        else:
            assert -(-needed // PAGE) * PAGE - before[0] > free
            assert (extent.size, extent.used) == before

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.owned)))
        self.arena.release(self.owned.pop(owner))

    @invariant()
    def everyone_keeps_what_they_wrote(self) -> None:
        for owner, extent in self.owned.items():
            assert extent.start >= 0
            assert extent.start + extent.size <= SLOTS
            held = self.slots[extent.start : extent.start + extent.used]
            assert held == [owner] * extent.used

    @invariant()
    def free_slots_add_up(self) -> None:
        assert self.arena.free == SLOTS - sum(extent.size for extent in self.owned.values())


ArenaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_arena = ArenaMachine.TestCase


def test_growth_stops_at_what_can_ever_be_needed() -> None:
    arena = Arena(SLOTS, move=lambda source, target, count: None)
    extent = arena.allocate(4 * PAGE)
    assert extent is not None
    assert arena.grow(extent, 4 * PAGE + 1, most=5 * PAGE)
    assert extent.size == 5 * PAGE
