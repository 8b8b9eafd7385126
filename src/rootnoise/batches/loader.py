"""The sampler's batches through torch's DataLoader, so that workers can prepare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from rootnoise._check import RootnoiseError, integer
from rootnoise.batches.samplers import Sampler


def data_loader(
    dataset: Any,
    sampler: Sampler,
    *,
    start: int = 0,
    stop: int | None = None,
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
        batch_sampler=_Steps(sampler, first, last),
        collate_fn=_Collate(collate_fn or default_collate),
        **options,
    )


class _Steps:
    """The sampler's batches from a step on, as DataLoader takes them."""

    def __init__(self, sampler: Sampler, start: int, stop: int) -> None:
        self.sampler, self.start, self.stop = sampler, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for t in range(self.start, self.stop):
            yield self.sampler.batch(t).tolist()


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
