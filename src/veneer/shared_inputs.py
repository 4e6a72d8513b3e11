"""Layers of one input run as one.

Models call query, key and value one after the other with the same tensor, and likewise gate and up. Which layers do so
is seen while they run, so nothing needs to be known of the model. From the next time on, the first of them runs all,
and the others find their outputs ready.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

from veneer.products import LowRank, run_layers, runs_by_hand

if TYPE_CHECKING:
    from veneer.adapted import Adapted


class SharedInputs:
    """What is known of the layers of one model, and the outputs that are ready.

    What is found out takes effect when no backward pass is due: gradient checkpointing calls the layers again in it,
    and must find them as they were.
    """

    def __init__(self) -> None:
        # By the wrapper that is called first; an empty list where it was tried and the others did not follow.
        self._groups: weakref.WeakKeyDictionary[Adapted, list[weakref.ref[Adapted]]] = weakref.WeakKeyDictionary()
        self._found: list[tuple[weakref.ref[Adapted], list[weakref.ref[Adapted]]]] = []
        self._due: weakref.WeakSet[_Pass] = weakref.WeakSet()
        self._seen: list[weakref.ref[Adapted]] = []
        self._seen_with = _Input()
        self._first: weakref.ref[Adapted] | None = None
        self._ready: dict[int, Tensor] = {}
        self._ready_for = _Input()

    def __reduce__(self) -> tuple[type[SharedInputs], tuple[()]]:
        return SharedInputs, ()  # a copy of the model finds out for itself

    def take(self, wrapper: Adapted, x: Tensor) -> Tensor | None:
        """The output of the wrapper's layer with its product, if an earlier call has made it for this input."""
        if id(wrapper) in self._ready and self._ready_for.is_(x):
            return self._ready.pop(id(wrapper))
        return None

    def run(self, wrapper: Adapted, x: Tensor, matrix: LowRank) -> Tensor:
        """The output of the wrapper's layer with its product; makes those of its group ready."""
        self._learn()
        group = self._groups.get(wrapper)
        if group is None:
            self._observe(wrapper, x)
        members, matrices = [wrapper], [matrix]
        for member in (reference() for reference in group or ()):
            found = None if member is None else self._matrix(member, wrapper, x, matrix)
            if member is not None and found is not None:
                members.append(member)
                matrices.append(found)
        due = _Pass()
        outputs = run_layers(x, [member.site for member in members], matrices, due)  # type: ignore[misc]
        self._due.add(due)
        if len(members) > 1:
            self._first, self._ready_for = weakref.ref(wrapper), _Input(x)
            self._ready = {id(member): y for member, y in zip(members[1:], outputs[1:], strict=True)}
        return outputs[0]

    def _learn(self) -> None:
        if self._ready:  # the others did not follow: they read something else, or are not always called
            assert self._first is not None
            self._found.append((self._first, []))
            self._ready = {}
        if self._found and not self._due:
            for first, others in self._found:
                if (wrapper := first()) is not None:
                    self._groups[wrapper] = others
            self._found = []

    def _observe(self, wrapper: Adapted, x: Tensor) -> None:
        if not self._seen_with.is_(x) or wrapper in (reference() for reference in self._seen):
            if len(self._seen) > 1:
                self._found.append((self._seen[0], self._seen[1:]))
            self._seen, self._seen_with = [], _Input(x)
        self._seen.append(weakref.ref(wrapper))

    @staticmethod
    def _matrix(member: Adapted, first: Adapted, x: Tensor, matrix: LowRank) -> LowRank | None:
        """What the member adds to its weight; none where it cannot run with the first."""
        adapter = member.alone()
        site, with_ = member.site, first.site
        if adapter is None or site is None or with_ is None or site.store is not with_.store:
            return None
        if adapter.training and adapter.dropout:
            return None
        found = adapter.product()
        if found is None or found.down.dtype != matrix.down.dtype or not runs_by_hand(site, x, found.down):  # type: ignore[arg-type]
            return None
        return found


class _Pass:
    """A backward pass that may come."""


class _Input:
    """A tensor as it was, without keeping it alive."""

    def __init__(self, x: Tensor | None = None) -> None:
        self._reference = None if x is None else weakref.ref(x)
        self._version = None if x is None else _version(x)

    def is_(self, x: Tensor) -> bool:
        return self._reference is not None and self._reference() is x and self._version == _version(x)


def _version(x: Tensor) -> int:
    """Counts changes in place; tensors made under `torch.inference_mode` have no count."""
    return 0 if x.is_inference() else x._version
