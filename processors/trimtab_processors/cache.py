"""The block pool: which slots of a control's key and value tensors belong to which sequence."""

from __future__ import annotations

BLOCK_SIZE = 16


class BlockPool:
    """A fixed number of blocks of `BLOCK_SIZE` token slots, taken and given back by number."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.blocks - self.free

    def take(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has made sure that so many are free."""
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give(self, blocks: list[int]) -> None:
        self._free.extend(blocks)


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)
