"""The sampler's batches through torch's DataLoader, so that workers can prepare them."""

from __future__ import annotations

import random  # noqa: TID251 - its state is put back
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Subset,
    TensorDataset,
    default_collate,
)

from rootnoise._check import RootnoiseError, integer
from rootnoise.participation.samplers import Indices, Sampler

# Examples on which a collate function is tried: no batch is a tuple of so many parts.
TRIED = 11


@dataclass(frozen=True)
class Split:
    """How a batch is divided into micro-batches, of sizes as equal as can be.

    Args:
        number: micro-batches of each batch; some may be empty.
        most: most examples in one, in place of `number`; an empty batch is one of them.
        rank: divides the part of each batch that this rank of several takes.
        size: number of ranks.

    >>> [part.tolist() for part in Split(most=3)(np.arange(5))]
    [[0, 1, 2], [3, 4]]
    >>> [part.tolist() for part in Split(2)(np.arange(1))]
    [[0], []]
    """

    number: int = 1
    most: int | None = None
    rank: int = 0
    size: int = 1

    def __call__(self, batch: Indices) -> list[Indices]:
        """Return the parts of a batch, in its order."""
        batch = batch[self.rank :: self.size]
        number = self.number if self.most is None else max(1, -(-len(batch) // self.most))
        return list(np.array_split(batch, number))


WHOLE = Split()


def data_loader(
    dataset: Any,
    sampler: Sampler,
    *,
    start: int = 0,
    stop: int | None = None,
    split: Split = WHOLE,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **options: Any,
) -> DataLoader[Any]:
    """Return a DataLoader that gives (indices, batch) for each step from `start` on.

    The batches are the sampler's, whatever the workers do: they only fetch what they are told to.
    A batch that drew nobody is None; the step is still to be taken, for its noise:

        for indices, batch in data_loader(dataset, sampler, start=optimizer.t, num_workers=2):
            optimizer.zero_grad()
            if batch is not None:
                loss(module, batch).backward()
            optimizer.step(indices)

    The loss must be a sum or mean of one term per example. What `collate_fn` computes from a whole
    batch (counts, weights) mixes examples where no probe of the optimizer can see it.

    Args:
        dataset: map-style, of sampler.n_examples examples.
        sampler: which examples each step takes.
        start: first step, such as `optimizer.t` of a run that is resumed; each iteration over the
            loader starts there.
        stop: the step before which an iteration ends; after the last one when None.
        split: divides each step's batch into the micro-batches that are loaded, one after another.
        collate_fn: makes a batch of a list of examples; torch's own when None.
        options: for DataLoader, such as num_workers and persistent_workers.

    Raises:
        RootnoiseError: a data set of another size, a start or stop past the end, or an option that
            would choose batches.
    """
    if len(dataset) != sampler.n_examples:
        raise RootnoiseError(
            f"dataset must have the sampler's n_examples={sampler.n_examples}, got {len(dataset)}"
        )
    first = integer("start", start, 0, sampler.n_steps, high_name="n_steps")
    last = sampler.n_steps if stop is None else stop
    integer("stop", last, first, sampler.n_steps, high_name="n_steps")
    for name in ("batch_size", "batch_sampler", "sampler", "shuffle", "drop_last"):
        if name in options:
            raise RootnoiseError(
                f"{name} must be left out: the sampler chooses, got {options[name]!r}"
            )
    return DataLoader(
        _Numbered(dataset),  # type: ignore[arg-type]  # no Dataset need be inherited from
        batch_sampler=_Steps(sampler, first, last, split),
        collate_fn=_Collate(collate_fn or default_collate),
        **options,
    )


def refuse_mixing(dataset: Any, collate_fn: Callable[[list[Any]], Any]) -> None:
    """Refuse a collate function that mixes examples, tried on a few of the data set.

    What it makes of an example must not change when others are replaced, but for padding. Numbers
    that belong to no example, such as a count, are not looked at. No global generator is moved.

    Raises:
        RootnoiseError: it mixes them (as mix-up does), or does not give the same again.
    """
    n = min(TRIED, len(dataset))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        examples = list(_Numbered(dataset).__getitems__(range(n))[1])
        after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

        def rows(sources: Sequence[int]) -> list[Any]:
            _set_generators(after)
            batch = collate_fn([examples[i] for i in sources])
            return [_row(batch, i, n) for i in range(n)]

        first = rows(range(n))
        for kept in (range(n), range(0, n, 2), range(1, n, 2)):
            found = rows([i if i in kept else kept[0] for i in range(n)]) if kept else first
            if not all(_alike(first[i], found[i]) for i in kept):
                got = "another row of one example" + ("" if len(kept) == n else " beside others")
                raise RootnoiseError(
                    f"collate_fn must make each example's row of that example alone, got {got} "
                    "(or take the duty upon you by independence='assumed')"
                )
    finally:
        _set_generators(states)


def _set_generators(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


def _row(batch: Any, i: int, n: int) -> Any:
    """Return what a batch of n examples holds of example i."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return batch[i] if batch.ndim and len(batch) == n else None
    if isinstance(batch, Mapping):
        return {name: _row(value, i, n) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return batch[i] if len(batch) == n else [_row(value, i, n) for value in batch]
    return None


def _alike(a: Any, b: Any) -> bool:
    """Whether two rows are equal where both of them are; one may be padded further."""
    if isinstance(a, torch.Tensor | np.ndarray) and isinstance(b, torch.Tensor | np.ndarray):
        one, other = np.asarray(a), np.asarray(b)
        if one.ndim != other.ndim:
            return False
        both = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape, strict=True))
        equal = one[both] == other[both]
        return bool(np.all(equal | ((one[both] != one[both]) & (other[both] != other[both]))))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return type(a) is type(b)


def refuse_repeats(data: Any) -> None:
    """Refuse a data set of torch's that holds a record twice: epsilon is that of one index.

    Seen are `Subset` and `ConcatDataset`, the ways in which torch repeats one, however they are put
    together. Oversampling a rare class by them is such a repeat.

    Raises:
        RootnoiseError: a record of another data set comes twice.
    """
    rule = "data must hold each record once, for epsilon is one index's"
    match data:
        case Subset():
            refuse_repeats(data.dataset)
        case ConcatDataset():
            for part in data.datasets:
                refuse_repeats(part)
            if len({id(part) for part in data.datasets}) < len(data.datasets):
                raise RootnoiseError(f"{rule}, got a ConcatDataset of one data set several times")
        case _:
            return
    found: dict[Any, list[Indices]] = {}
    for leaf, indices in _leaves(data, np.arange(len(data))):
        found.setdefault(leaf, []).append(indices)
    for parts in found.values():
        indices, counts = np.unique(np.concatenate(parts), return_counts=True)
        if counts.size and counts.max() > 1:
            i, n = indices[counts.argmax()], counts.max()
            kind = type(data).__name__
            raise RootnoiseError(f"{rule}, got a {kind} with index {i} {n} times")


def _leaves(data: Any, indices: Indices) -> Iterator[tuple[Any, Indices]]:
    """Yield which records, in [0, n), of which other data sets these records of a data set are."""
    match data:
        case Subset():
            whole: Any = data.dataset  # of a known size, which torch's type does not say
            inner = np.asarray(data.indices, dtype=np.int64)[indices]
            yield from _leaves(whole, np.where(inner < 0, inner + len(whole), inner))
        case ConcatDataset():
            start = 0
            for part, stop in zip(data.datasets, data.cumulative_sizes, strict=True):
                own = (indices >= start) & (indices < stop)
                yield from _leaves(part, indices[own] - start)
                start = stop
        case TensorDataset():  # another one of the same tensors has the same records
            yield tuple(map(id, data.tensors)), indices
        case _:
            yield id(data), indices


class _Steps:
    """The sampler's batches from a step on, as DataLoader takes them."""

    def __init__(self, sampler: Sampler, start: int, stop: int, split: Split) -> None:
        self.sampler, self.start, self.stop, self.split = sampler, start, stop, split

    def __len__(self) -> int:
        return count(self.sampler, self.start, self.stop, self.split)

    def __iter__(self) -> Iterator[list[int]]:
        for t in range(self.start, self.stop):
            for part in self.split(self.sampler.batch(t)):
                yield part.tolist()


def count(sampler: Sampler, start: int, stop: int, split: Split) -> int:
    """Return how many micro-batches the steps from `start` to before `stop` have."""
    if split.most is None:
        return (stop - start) * split.number
    return sum(len(split(sampler.batch(t))) for t in range(start, stop))


class _Numbered:
    """The data set, with the numbers of the examples that were asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Sequence[int], list[Any]]:
        many = getattr(self.dataset, "__getitems__", None)
        return indices, many(indices) if many else [self.dataset[i] for i in indices]


class _Collate:
    """Collates the examples, if there are any."""

    def __init__(self, inner: Callable[[list[Any]], Any]) -> None:
        self.inner = inner

    def __call__(self, fetched: Any) -> tuple[torch.Tensor, Any]:
        indices, examples = fetched
        batch = self.inner(examples) if len(examples) else None
        return torch.tensor(indices, dtype=torch.int64), batch
