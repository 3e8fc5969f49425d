"""Where every sequence is (waiting, running in a slot, parked) and which pages it has; mechanism without policy."""

from __future__ import annotations

from bisect import bisect_left, insort

from llm_infer.kvcache.groups import Windows
from llm_infer.kvcache.page_allocator import NULL_PAGE, PageAllocator
from llm_infer.kvcache.page_table import PageTable
from llm_infer.kvcache.prefix_cache import PrefixCache
from llm_infer.kvcache.states import States
from llm_infer.scheduler.request import Sequence, Status


class Books:
    """Lists of sequences, each in the order of rank, and the pages behind them.

    Attributes:
        waiting: sequences to be admitted, new and preempted ones.
        running: `running[shard]`, sequences that own a slot.
        parked: `parked[shard]`, the waiting sequences that hold pages: forks that share those of their prompt.
        free_slots: `free_slots[shard]`.
        allocator, prefix_cache: the pages; None without prefix caching.
        states: pages of states; None for models without.
        windows: of each group of layers that has pages.
        ahead: tokens of a sequence that may be planned and not committed.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        num_shards: int,
        num_slots: int,
        enable_prefix_caching: bool,
        windows: Windows = (None,),
        ahead: int = 0,
        num_states: int = 0,
    ) -> None:
        self.page_size, self.windows, self.ahead = page_size, windows, ahead
        self.num_slots = num_slots
        self.allocator = PageAllocator(num_pages, num_shards)
        self.prefix_cache = PrefixCache(self.allocator, page_size, windows) if enable_prefix_caching else None
        self.states = States(num_states, num_shards) if num_states else None
        self.waiting: list[Sequence] = []
        self.running: list[list[Sequence]] = [[] for _ in range(num_shards)]
        self.parked: list[list[Sequence]] = [[] for _ in range(num_shards)]
        self.free_slots = [list(range(num_slots))[::-1] for _ in range(num_shards)]

    def enqueue(self, sequence: Sequence) -> None:
        """Lets a sequence wait, with its pages if it has any."""
        insort(self.waiting, sequence, key=_rank)
        if sequence.table is not None:
            insort(self.parked[sequence.table.shard], sequence, key=_rank)

    def start(self, sequence: Sequence, shard: int, cached: list[list[int]]) -> PageTable:
        """Makes a waiting sequence run in a slot; its table has the pages it held, or else those in `cached`."""
        _remove(self.waiting, sequence)
        _remove(self.parked[shard], sequence)
        if sequence.table is None:
            sequence.table = PageTable(self.allocator, shard, self.page_size, self.windows)
            sequence.table.adopt(cached)
            sequence.num_computed = sequence.table.length
            sequence.num_cached_pages = len(cached[0])
            if self.states is not None and cached[0]:
                sequence.state = self.states.adopt(shard, sequence.digests[len(cached[0]) - 1])
        sequence.request.shard = shard
        self.enter_slot(sequence, shard)
        return sequence.table

    def has_slot(self, sequence: Sequence, shard: int) -> bool:
        """Tells whether `start` would find a slot. A group takes the slots of all its sequences with the first."""
        request = sequence.request
        return bool(request.spare_slots) or len(self.free_slots[shard]) >= request.width

    def preempt(self, sequence: Sequence) -> None:
        """Makes a running sequence give up its slot and its pages, and wait."""
        self._leave_slot(sequence)
        self._drop_pages(sequence)
        sequence.status = Status.PREEMPTED
        self.enqueue(sequence)

    def unpark(self, sequence: Sequence) -> None:
        """Makes a waiting fork give up its pages; it will compute the prompt on its own."""
        assert sequence.table is not None
        _remove(self.parked[sequence.table.shard], sequence)
        self._drop_pages(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Lets `child`, in no list yet, share the pages of the prompt but for its last token, which it computes itself."""
        length = len(parent.request.prompt) - 1
        assert parent.table is not None
        child.table = parent.table.fork(length)
        child.table.release_behind(length)
        child.num_computed = length
        child.digests = list(parent.digests)
        child.num_cached_pages = parent.num_cached_pages
        self.share_state(parent, child)

    def share_state(self, parent: Sequence, child: Sequence) -> None:
        """Gives `child`, which has none, the state of `parent` too."""
        if self.states is not None and parent.state is not None:
            assert parent.table is not None
            self.states.allocator.share(parent.table.shard, (parent.state,))
            child.state = parent.state

    def drop_state(self, sequence: Sequence) -> None:
        """Gives back the state of a sequence that has its pages still, and its snapshots that nobody has seen."""
        if self.states is not None:
            assert sequence.table is not None
            pages = [page for _, page in sequence.snapshots] + ([] if sequence.state is None else [sequence.state])
            self.states.allocator.release(sequence.table.shard, pages)
            sequence.state, sequence.snapshots = None, []

    def end(self, sequence: Sequence) -> None:
        """Takes a sequence out for good, from wherever it is."""
        if sequence.status is Status.RUNNING:
            self._leave_slot(sequence)
        else:
            _remove(self.waiting, sequence)
            if sequence.table is not None:
                _remove(self.parked[sequence.table.shard], sequence)
        if sequence.table is not None:
            self._drop_pages(sequence)
        sequence.status = Status.FINISHED

    def offer_pages(self, sequence: Sequence, full: int) -> None:
        """Registers the first `full` pages of a sequence, whose tokens are all computed, with the prefix cache."""
        cache, table = self.prefix_cache, sequence.table
        assert table is not None
        if cache is not None:
            request = sequence.request
            cache.extend(sequence.digests, sequence.tokens, full, request.cache_salt, request.weights)
            for index in range(sequence.num_cached_pages, full):
                for group, pages in enumerate(table.groups):
                    if pages[index] != NULL_PAGE:
                        cache.insert(table.shard, sequence.digests[index], pages[index], group)
        sequence.num_cached_pages = full
        if sequence.snapshots:
            self._offer_snapshots(sequence, full)

    def _offer_snapshots(self, sequence: Sequence, full: int) -> None:
        """Registers the snapshots behind the first `full` pages; of those behind drawn tokens only the last one stays."""
        states, table = self.states, sequence.table
        assert states is not None and table is not None
        shard, prompt = table.shard, len(sequence.request.prompt)
        ready = [each for each in sequence.snapshots if each[0] <= full * self.page_size]
        for length, page in ready:
            digest = sequence.digests[length // self.page_size - 1]
            states.insert(shard, digest, page)
            if length > prompt:
                if sequence.latest is not None:
                    states.drop(shard, sequence.latest)
                sequence.latest = digest
            states.allocator.release(shard, (page,))
        sequence.snapshots = sequence.snapshots[len(ready) :]

    def enter_slot(self, sequence: Sequence, shard: int) -> None:
        """Makes a sequence that has its pages run; there is a slot."""
        request = sequence.request
        if not request.spare_slots:
            request.spare_slots = [self.free_slots[shard].pop() for _ in range(request.width)]
        sequence.slot = request.spare_slots.pop()
        sequence.status = Status.RUNNING
        insort(self.running[shard], sequence, key=_rank)

    def _leave_slot(self, sequence: Sequence) -> None:
        assert sequence.table is not None and sequence.slot is not None
        request, free = sequence.request, self.free_slots[sequence.table.shard]
        _remove(self.running[sequence.table.shard], sequence)
        request.spare_slots.append(sequence.slot)
        if len(request.spare_slots) == request.width:
            free += request.spare_slots
            request.spare_slots = []
        sequence.slot = None

    def _drop_pages(self, sequence: Sequence) -> None:
        assert sequence.table is not None
        self.drop_state(sequence)
        sequence.table.free()
        sequence.table = None
        sequence.num_computed = sequence.num_cached_pages = 0
        request = sequence.request
        if all(other.table is None for other in request.sequences):
            request.shard = None  # free to go elsewhere


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _remove(ranked: list[Sequence], sequence: Sequence) -> None:
    """Removes a sequence from a list in the order of rank, if it is there."""
    index = bisect_left(ranked, sequence.rank, key=_rank)
    if index < len(ranked) and ranked[index] is sequence:
        del ranked[index]
