"""`PrivateModule`: one forward and one backward per micro-batch, and no raw gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from rootnoise._check import RootnoiseError, integer, warn
from rootnoise.training.clip.attention import divide, divides
from rootnoise.training.clip.bounds import Space, Sum, add_rows_, check_size, row_squares
from rootnoise.training.clip.fallback import WHOLE, Fallback, opacus_sampler
from rootnoise.training.clip.layers import Kept, Row, row_of
from rootnoise.training.clip.products import MadeTwice, Products
from rootnoise.training.clip.recurrent import Found, Recurrent, Steps, unrolls
from rootnoise.training.clip.rules import ClipRule
from rootnoise.training.clip.sums import Sums
from rootnoise.training.clip.taps import (
    Book,
    Call,
    Tapped,
    Taps,
    guard_parameter,
    kind_of,
    refuse_unseen,
    shared,
)


class PrivateModule(nn.Module):
    """A model whose backward leaves taps instead of gradients; clipped sums are computed from them.

    Parameters keep `requires_grad`, but no backward writes their `.grad`: a gradient that reaches a
    parameter other than through its layer is refused, and the parameter named. Guarantees, for any
    loss that is a sum or mean over the examples:

    1. `norms` are never below the true ones (theorems in `clip.bounds`).
    2. One example changes the sum of `finish` by at most the rule's `sensitivity`.
    3. A gradient that is not finite counts as zero and is counted; it does not affect others.
    4. One forward and one backward per micro-batch: a second one is refused before it counts.

    Args:
        module: each output row a function of its own input row alone; the batch is every layer's
            first dimension.
        loss_reduction: how the loss reduces a micro-batch, "mean" or "sum".
        guarded: the caller counts passes and refuses steps accordingly, as
            `rootnoise.training.guards` does, and probes whether examples mix. Then a second forward
            replaces the first, a backward of a dropped forward is ignored, and so is a term of the
            loss that depends on parameters alone, such as a penalty.

    Raises:
        RootnoiseError: another reduction, a compiled model, no trainable parameter, or an embedding
            that rescales its rows or gradients by the batch.

    >>> model = PrivateModule(nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    >>> model(x).mean().backward()
    >>> model.norms(rows=2)
    tensor([5.0000, 0.5000], dtype=torch.float64)
    >>> from rootnoise.training.clip import Flat
    >>> model.add(Flat(1.0))
    >>> model.finish()
    (tensor([0.6000, 1.3000], dtype=torch.float64), 0)
    """

    def __init__(
        self, module: nn.Module, loss_reduction: str = "mean", *, guarded: bool = False
    ) -> None:
        super().__init__()
        if loss_reduction not in ("mean", "sum"):
            raise RootnoiseError(f"loss_reduction must be mean or sum, got {loss_reduction!r}")
        refuse_unseen(module)
        self._module: Any = module
        self.loss_reduction = loss_reduction
        self._trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self._trainable:
            raise RootnoiseError("model must have a trainable parameter, got none")
        self._book = book = Book(self._trainable, guarded, self.discard)
        module.register_forward_pre_hook(book.enter, with_kwargs=True)
        self._rows: dict[Tapped, Row | None] = {}
        self._falls: dict[Tapped, Fallback] = {}
        self._fill(module)
        module.register_forward_hook(book.leave, with_kwargs=True, always_call=True)
        self._tied = shared(tapped.module for tapped in self._rows)
        self._groups: dict[nn.Parameter, int] = {}
        for group, tapped in enumerate(self._rows):
            for p in tapped.parameters.values():
                self._groups.setdefault(p, group)
        self._taps: dict[Tapped, list[Taps]] = {}
        self._single: dict[Tapped, Taps] = {}  # whose arrays are not held, unless more calls come
        self._grads: dict[nn.Parameter, torch.Tensor] = {}
        self._norms: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        self._sums = Sums(self._trainable.values())
        self._bad = self._examples = self._tokens = 0
        self._kept: dict[Tapped, Kept] = {}
        self._probed, self._probing, self._adding = guarded, False, False
        for name, p in self._trainable.items():
            guard_parameter(book, name, p)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy, or of a file, what is not noised: gradients, norms and sums."""
        none: dict[str, Any] = {"_taps": {}, "_single": {}, "_grads": {}, "_kept": {}}
        counts = {"_norms": None, "_squares": None, "_bad": 0, "_examples": 0, "_tokens": 0}
        return self.__dict__ | none | counts | {"_sums": Sums(self._trainable.values())}

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attributes, which hosts read, such as its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_module":
                raise
            return getattr(self._module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; in training mode with gradients, its layers are tapped.

        Raises:
            RootnoiseError: an earlier forward still waits for its backward and `add` (`zero_grad`
                drops it), or no argument is a tensor.
        """
        book = self._book
        book.called = True
        try:
            if not self._probed and self.training and torch.is_grad_enabled() and not book.open:
                tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
                if tensors and tensors[0].dim() and len(tensors[0]) > 1:
                    self._probe(len(tensors[0]), args, kwargs)
                    self._probed = True
            return self._module(*args, **kwargs)
        finally:
            book.called = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model as a plain one: passes inside leave no taps, and existing taps stay."""
        before, self._book.paused = self._book.paused, True
        try:
            yield
        finally:
            self._book.paused = before

    @property
    def running_again(self) -> bool:
        """Whether a layer is being run again for its gradients, or the module is paused."""
        return self._book.paused

    @property
    def past(self) -> str:
        """The parameter that a gradient has reached past its layer since forward, or ""."""
        return self._book.past

    @property
    def rows(self) -> int:
        """Number of examples whose gradients backward has left, or 0."""
        return self._book.rows if self._book.open and self._book.gradients else 0

    @property
    def left(self) -> list[torch.Tensor]:
        """What backward has left, from which norms and sums are computed."""
        taps = [t for calls in (*self._taps.values(), self._single.values()) for t in calls]
        return [*(x for inputs, g in taps for x in (*inputs.values(), g)), *self._grads.values()]

    def _probe(self, rows: int, args: Any, kwargs: Any) -> None:
        """Refuse a model that puts the gradient of one example's output into another one's row.

        Examples are layers over (T, N, d), or a table of T positions, when T happens to equal N;
        when it does not, the number of rows reveals them. Nothing is kept, and no random number is
        consumed.
        """
        with torch.random.fork_rng():
            outputs = tree_leaves(self._module(*args, **kwargs))
            own = [
                x[-1].flatten()
                for x in outputs
                if isinstance(x, torch.Tensor) and x.requires_grad and x.dim() and len(x) == rows
            ]
            try:
                self._probing = True
                weighted = [(x * torch.linspace(1, 2, len(x), device=x.device)).sum() for x in own]
                if weighted:
                    torch.autograd.backward(weighted)
            finally:
                self._probing = False
                self.discard()

    def _check_probe(self, tapped: Tapped, g: torch.Tensor) -> None:
        if self._probing and bool((g[:-1] != 0).any()):
            raise RootnoiseError(
                f"layer {tapped.name} must keep the examples apart, each in its row of the first "
                "dimension, got one example's gradient in another's row"
            )

    def norms(self, rows: int) -> torch.Tensor:
        """Return an upper bound on each example's gradient norm, float64, possibly NaN or infinite.

        Args:
            rows: number of examples that the micro-batch must have; 0 needs no forward.

        Raises:
            RootnoiseError: no forward and backward since the last `add`, or one of other rows. A
                backward that goes on afterwards is refused, too.
        """
        integer("rows", rows, 0)
        book = self._book
        if not book.open:
            if rows:
                raise RootnoiseError(
                    "gradients are missing: run forward and backward once, in training mode, on "
                    "the private module (evaluate under no_grad)"
                )
            self._squares = torch.zeros(len(self._rows), 0, dtype=torch.float64)
            self._norms = self._squares.sum(0)
            return self._norms
        if not book.gradients:
            raise RootnoiseError("backward must run once a micro-batch, got none since forward")
        if rows != book.rows:
            raise RootnoiseError(f"indices must be one a gradient row ({book.rows}), got {rows}")
        if self._norms is None:
            with torch.no_grad():
                self._squares = self._group_squares()
                self._norms = self._squares.sum(0).sqrt()
        return self._norms

    def check(self, rows: int, wanted: str) -> None:
        """Refuse taps that are not of one backward of `rows` examples, or too many for a step.

        Args:
            rows: examples of the micro-batch.
            wanted: said to be missing where there are none.

        Raises:
            RootnoiseError: as said, or as for `bounds.check_size`.
        """
        found = self.rows
        if rows and not found:
            raise RootnoiseError(
                f"{wanted} are missing: run forward and backward once, in training mode "
                "(evaluate under no_grad)"
            )
        if found != rows:
            raise RootnoiseError(f"indices must be one a gradient row ({found}), got {rows}")
        kept = ((self._rows[tapped], taps) for tapped, taps in self._taps.items())
        tokens = [row.length(taps) for row, taps in kept if row is not None]
        check_size(self._examples + rows, max([self._tokens, *tokens]))

    def add(self, rule: ClipRule) -> None:
        """Add the clipped sum of the micro-batch that `norms` measured, and forget its taps.

        Raises:
            RootnoiseError: `norms` was not called since the last `add`, or the step has more
                examples than the rounding analysis in `bounds` covers.
        """
        self._check_whole()
        if self._norms is None or self._squares is None:
            raise RootnoiseError("norms must be asked for before their clipped sum is added")
        self._examples += len(self._norms)
        self._tokens = max([self._tokens, *(kept.tokens for kept in self._kept.values())])
        check_size(self._examples, self._tokens)
        self._adding = True
        with torch.no_grad():
            finite = self._norms.isfinite()
            n_bad = len(finite) - int(finite.sum())
            bad = ~finite if n_bad else None
            squares = self._squares if bad is None else self._squares.masked_fill(bad, 1.0)
            scales = rule.factors(squares) * self._factor()
            if bad is not None:
                scales = scales.masked_fill(bad, 0.0)
            self._add(scales, bad)
        self._bad += n_bad
        self._adding = False
        self.discard()

    def finish(self) -> tuple[torch.Tensor, int]:
        """Return the flattened float64 sum of all micro-batches and how many examples were bad.

        Raises:
            RootnoiseError: a micro-batch was forwarded but not added, or an `add` failed midway.
        """
        self._check_finished()
        return self._sums.whole(), self._finished()

    def finish_in_parts(self, size: int) -> tuple[Iterator[torch.Tensor], int]:
        """Return what `finish` does, but the sum in parts, to be read one by one (`clip.sums`).

        Args:
            size: of a part, in numbers.

        Raises:
            RootnoiseError: as for `finish`.
        """
        self._check_finished()
        return self._sums.parts(size), self._finished()

    def reuse(self, vector: torch.Tensor) -> None:
        """Take back what `finish` returned: the next step's sum will be made in its memory."""
        self._sums.reuse(vector)

    def _finished(self) -> int:
        bad, self._bad = self._bad, 0
        self._examples = self._tokens = 0
        return bad

    def _check_finished(self) -> None:
        self._check_whole()
        if self._book.open:
            raise RootnoiseError("micro-batch must be added before the step is finished")

    def _check_whole(self) -> None:
        if self._adding:
            raise RootnoiseError("sum must be whole, got one whose add was broken off: start anew")

    def restart(self) -> None:
        """Drop the sum of the micro-batches so far, complete or not; the step starts over."""
        self._sums.drop()
        self._bad = self._examples = self._tokens = 0
        self._adding = False

    def discard(self) -> None:
        """Drop the forward and backward that were not added."""
        book = self._book
        book.open = book.inside = book.gradients = False
        self._taps, self._single, self._grads, self._kept = {}, {}, {}, {}
        self._norms = self._squares = None
        for space in self._spaces():
            space.free()

    def train(self, mode: bool = True) -> PrivateModule:
        """Set training or evaluation mode; in the latter no memory of gradients is held."""
        if not mode:
            for space in self._spaces():
                space.drop()
        super().train(mode)
        return self

    def _spaces(self) -> Iterator[Space]:
        return (row.space for row in self._rows.values() if isinstance(row, Products))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and the forward and backward that were not added.

        If the module is guarded, a forward whose backward is still to come is kept.
        """
        book = self._book
        book.inside, book._depth = False, 0  # an interrupt may have left a forward open
        if not book.guarded or book.gradients:
            self.discard()
        super().zero_grad(set_to_none)

    # ------------------------------------------------------------------------------ construction

    def _fill(self, module: nn.Module, prefix: str = "") -> None:
        """Tap the layers of a module, so that each trainable parameter belongs to one of them."""
        below = {p for child in module.children() for p in child.parameters() if p.requires_grad}
        # A recurrent layer of Opacus also holds its cells' parameters, under torch's names.
        own = {
            n
            for n, p in module._parameters.items()
            if p is not None and p.requires_grad and p not in below
        }
        if not own and not below:
            return
        if divides(module):
            parts = {"in_proj": divide(prefix or "model", module), "out_proj": module.out_proj}
            for name, part in parts.items():
                self._fill(cast(nn.Module, part), f"{prefix}.{name}" if prefix else name)
            return
        if unrolls(module):
            self._tap_recurrent(prefix or "model", module)
            return
        row = row_of(module, sorted(own)) if not below else None
        if row is not None or own or isinstance(module, WHOLE):
            self._tap(prefix or "model", module, row)
            return
        for name, child in module.named_children():
            self._fill(child, f"{prefix}.{name}" if prefix else name)

    def _tap(self, name: str, module: nn.Module, row: Row | None) -> None:
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        names = None if row is None else row.names
        if row is None and opacus_sampler(module) is not None:
            names = ["input"]
        tapped = Tapped(name, module, parameters, names, self._book, self._keep)
        if names is None:
            self._falls[tapped] = Fallback()
            warn(
                f"layer {name} ({kind_of(module).__name__}) is not in the table of layers: its "
                "gradients are made one by one for each example, exactly but slowly"
            )
        self._rows[tapped] = row
        tapped.hook()

    def _tap_recurrent(self, name: str, module: nn.Module) -> None:
        """Tap a recurrent layer, and have its calls kept as those of its parts."""
        layer, rows = Recurrent(name, module), {}
        for part in layer.parts():
            own = {n: p for n, p in part.named_parameters() if p.requires_grad}
            if own:
                tapped = Tapped(name, part, own, ["input"], self._book, self._keep)
                self._rows[tapped] = rows[tapped] = Steps(part, list(own))

        def keep(found: Found) -> None:
            self._check_unmeasured(name)
            for tapped, row in rows.items():
                taps = row.taps(found)
                self._check_probe(tapped, taps[1])
                self._keep_taps(tapped, taps)

        layer.tap(self._book, keep)

    # ----------------------------------------------------------------------------- what is kept

    def _keep(
        self, call: Call, inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]
    ) -> None:
        """Keep one call, as taps or, where these are no larger, as per-sample gradients."""
        tapped, row = call.layer, self._rows[call.layer]
        self._check_unmeasured(tapped.name)
        if tapped.names is None:
            made = self._falls[tapped].per_sample(tapped, call, inputs, gradients)
            self._keep_gradients(tapped, made)
            return
        (g,) = gradients
        if g is None:
            return
        self._check_probe(tapped, g)
        taps = dict(zip(call.context, inputs, strict=True)), g
        if row is None:
            sampler = opacus_sampler(tapped.module)
            assert sampler is not None  # noqa: S101 - it was there at construction
            made = sampler(tapped.module, list(inputs), g)
            names = {p: n for n, p in tapped.gathered().items()}
            self._keep_gradients(tapped, {names[p]: x for p, x in made.items()})
        else:
            self._keep_taps(tapped, taps)

    def _check_unmeasured(self, name: str) -> None:
        """Refuse gradients that come after the norms, which would be added unclipped."""
        if self._norms is not None:
            raise RootnoiseError(
                f"backward must end before norms are asked for, got more of it at layer {name}"
            )

    def _keep_taps(self, tapped: Tapped, taps: Taps) -> None:
        row = self._rows[tapped]
        assert row is not None  # noqa: S101 - a layer of the table
        tied = not self._tied.isdisjoint(tapped.parameters.values())
        more = self._make_single(tapped)
        if not (tied or row.small([taps])):
            self._taps.setdefault(tapped, []).append(taps)
        elif more or tied or not (isinstance(row, Products) and row.twice(taps)):
            self._keep_gradients(tapped, row.per_sample(taps))
        else:
            self._single[tapped] = taps

    def _make_single(self, tapped: Tapped) -> bool:
        """Hold a layer's arrays as other calls need it, and return whether any are held."""
        taps, row = self._single.pop(tapped, None), self._rows[tapped]
        if taps is not None and row is not None:
            self._keep_gradients(tapped, row.per_sample(taps))
        return any(p in self._grads for p in tapped.parameters.values())

    def _keep_gradients(self, tapped: Tapped, made: dict[str, torch.Tensor]) -> None:
        for name, x in made.items():
            p = tapped.parameters[name]
            rows = x.reshape(len(x), -1)
            if rows.shape != (self._book.rows, p.numel()):
                rule = f"must have {self._book.rows} gradients of {p.numel()} numbers"
                raise RootnoiseError(f"layer {tapped.name} {rule}, got {tuple(rows.shape)}")
            self._check_probe(tapped, rows)
            self._grads[p] = self._grads[p] + rows if p in self._grads else rows

    def _group_squares(self) -> torch.Tensor:
        """Return squared norms by layer, (layers, examples), for the loss as a sum."""
        where = next(iter(self._trainable.values())).device
        squares = torch.zeros(len(self._rows), self._book.rows, dtype=torch.float64, device=where)
        self._kept = {}
        for group, (tapped, row) in enumerate(self._rows.items()):
            taps = self._taps.pop(tapped, [])
            if isinstance(row, Products) and tapped in self._single and not taps:
                self._kept[tapped] = MadeTwice(row, self._single.pop(tapped))
            elif not taps or row is None:
                continue
            elif self._make_single(tapped) or row.small(taps):  # so are others, or all together
                for one in taps:
                    self._keep_gradients(tapped, row.per_sample(one))
                continue
            else:
                self._kept[tapped] = row.kept(taps)
            squares[group] += self._kept[tapped].squares().to(where)
        for p, rows in self._grads.items():
            squares[self._groups[p]] += row_squares(rows).to(where)
        return squares * self._factor() ** 2

    def _factor(self) -> int:
        """Return the number by which a mean over the micro-batch has divided gradients."""
        return self._book.rows if self.loss_reduction == "mean" else 1

    def _add(self, scales: torch.Tensor, bad: torch.Tensor | None) -> None:
        if not self._book.open:  # an empty micro-batch
            return
        for tapped, scale in zip(self._rows, scales, strict=True):
            self._add_layer(tapped, scale, bad)

    def _add_layer(self, tapped: Tapped, scale: torch.Tensor, bad: torch.Tensor | None) -> None:
        """Add the sums of a layer's own parameters; tied ones are the first layer's."""
        kept = self._kept.pop(tapped, None)
        if kept is not None:
            sums = {n: self._sum_of(p) for n, p in tapped.parameters.items()}
            kept.add_(sums, scale, bad)
        for p in tapped.parameters.values():
            rows = self._grads.pop(p, None)
            if rows is None:
                continue
            if bad is not None:
                rows = rows.masked_fill(bad[:, None], 0)
            add_rows_(self._sum_of(p), rows, scale)

    def _sum_of(self, p: nn.Parameter) -> Sum:
        return self._sums.of(p)
