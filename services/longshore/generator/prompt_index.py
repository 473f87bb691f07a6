"""Which slot's cache begins with which context, so that a prompt seen before is copied and not computed again.

Pure bookkeeping over slot numbers: knows neither tensors nor whether a slot is in use. A slot's context stays good
after its sequence has ended, until the slot is filled anew.
"""

from __future__ import annotations

from collections.abc import Sequence

Context = tuple[int, ...]


class PromptIndex:
    """Contexts by slot and slots by context; `clear` it when caches no longer mean what they did."""

    def __init__(self) -> None:
        self._context_of: dict[int, Context] = {}
        # The slot that was filled last, of those that share a context.
        self._slot_of: dict[Context, int] = {}

    def clear(self) -> None:
        self._context_of.clear()
        self._slot_of.clear()

    def context_of(self, slot: int) -> Context:
        return self._context_of[slot]

    def forget(self, slots: Sequence[int]) -> None:
        """These slots are filled with what nobody may copy."""
        for slot in slots:
            self._forget(slot)

    def plan(self, slots: Sequence[int], contexts: Sequence[Context]) -> tuple[dict[int, Context], dict[int, int]]:
        """Gives each slot its context from now on.

        Returns slots whose context must be computed (slot -> context), and then slots to copy from others (slot ->
        source). Empty contexts need neither.
        """
        for slot in slots:
            self._forget(slot)
        computed: dict[int, Context] = {}
        copied: dict[int, int] = {}
        for slot, context in zip(slots, contexts, strict=True):
            if not context:
                continue
            source = self._slot_of.get(context)
            if source is None:
                computed[slot] = context
            else:
                # A source may itself be a copy of this call: then what it copies is as good.
                copied[slot] = copied.get(source, source)
            self._context_of[slot] = context
            self._slot_of[context] = slot
        return computed, copied

    def _forget(self, slot: int) -> None:
        context = self._context_of.pop(slot, None)
        if context is not None and self._slot_of.get(context) == slot:
            del self._slot_of[context]
