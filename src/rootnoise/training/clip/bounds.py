"""Norms that are never too small, and sums that one example changes by at most the clip norm.

An example's gradient of a linear layer (Linear, convolutions) is c = sum_t g_t a_t^T over its T
tokens, with inputs a_t and output gradients g_t. There are two ways to compute its norm:

1. Compute c in float32, measure *that* array, and add *that* array times its factor. The array that
   is added is the one that was measured, so errors in c do not matter: it is a function of one
   example, and the clip norm bounds it.
2. Do not compute c. Its squared norm is sum_{t,u} (a_t . a_u)(g_t . g_u), from two T x T Gram
   matrices, and the sum over all examples and tokens is one matrix product.
3. Make the factor from a Gram norm, as in 2, but compute c in float32 when it is added, and measure
   *that* array: where it exceeds the norm bound, its factor shrinks. It takes float32 inputs of
   `SINGLE` tokens or more, on a CPU. Then Gram matrices may be float32 too.

**Theorem (lengths).** Let v = 2^-24. A float32 array of n numbers is cut into pieces of `CHUNK`,
whose float32 norms are squared and added in float64 to s. If s is finite, and n `SAFE[0]` or more,
then s (1 + PIECES / 2) >= |c|^2, too large by a relative PIECES = 8.1e-6 at most. *Proof.* Squares
do not cancel: each errs by v, adding CHUNK of them in any order by (CHUNK - 1) v, and the root by
v, which squaring doubles: (CHUNK + 2) v, and less than (CHUNK + 3) v with higher orders. A square
below float32's normal numbers loses at most 2^-126, n of them 2^-46 s. QED Other arrays, those of
zeros among them, are measured in float64.

**Theorem (Gram norms).** Let u = 2^-53, S = sum_t |a_t| |g_t|, and q the sum above in float64,
in any order. If d_in + d_out + T^2 <= GRAM, then max(q + FLOOR S^2, S^2 / RATIO^2) (1 + 1e-9)
>= |c|^2, and its root exceeds |c| by at most 0.1 % while S <= 31 |c|.
*Proof.* A float64 inner product of length d errs by at most gamma_d sum_k |x_k y_k|
<= gamma_d |x| |y|, gamma_d = d u / (1 - d u) (Higham 2002, section 3.1; any order). So each
product of two Gram entries errs by at most ((1 + gamma_din)(1 + gamma_dout)(1 + u) - 1)
|a_t||a_u||g_t||g_u|, and adding T^2 of them by gamma_{T^2} of their sum of magnitudes, which is at
most S^2 (1 + 1e-6). Together at most 2 (d_in + d_out + T^2 + 4) u S^2 < 0.9 FLOOR S^2, and S itself
is known to a relative (d_in + d_out + T + 4) u. While S <= 31 |c|, q + FLOOR S^2 exceeds |c|^2 by
at most 2 FLOOR S^2 <= 2e-3 |c|^2, and S^2 / RATIO^2 is the smaller. QED

**Theorem (float32 Gram norms).** Let Gram entries be sums, in float64, of float32 inner products of
`CHUNK` terms, whose squares lie in `SAFE`. Then q + ROUGH S^2 >= |c|^2, while T^2 <= 2^28.
*Proof.* With v = 2^-24, a chunk k of an entry errs by at most gamma |a_tk| |a_uk| for
gamma = CHUNK v / (1 - CHUNK v), and so an entry by gamma |a_t| |a_u| by the Cauchy-Schwarz
inequality, however many chunks. So each product of two entries errs by at most
2.01 CHUNK v |a_t||a_u||g_t||g_u|, their float64 sum by 2^-25 S^2, less than 0.004 CHUNK v S^2, and
S^2 is known to a relative 2.01 CHUNK v. A token of `SAFE` squares is longer than 2^-41. Below
float32's normal numbers an entry loses at most d 2^-126 <= 0.02 CHUNK v 2^-82, for widths d of at
most 2^20. Together less than 2.1 CHUNK v S^2 < ROUGH S^2. A token of zeros, such as the first state
of a recurrent layer, adds nothing to either. QED

A convolution's tokens are windows: a_t . a_u is a sum over the kernel's places o of products of the
pixels t + o and u + o. Both theorems hold for entries that are so added up from Gram matrices of
pixels, since sum_o |x_{t+o}||x_{u+o}| <= |a_t||a_u|, again by Cauchy-Schwarz, and no entry takes
more than d_in additions. There the pixels' squares lie in `SAFE`, or are those of zeros.

Where ROUGH S^2 is more than COSTLY q, so that a norm might be over 0.1 % too large, or a token is
neither `SAFE` nor zero, the example's norm is made anew in float64. That looks at one example
alone. That a norm is not too small rests on float32 products that are made in float32; that a sum
moves by at most C does not, as its arrays are measured.

For T tokens in independent directions, S is about sqrt(T) |c|. If S exceeds 31 |c|, the tokens
nearly cancel; the clipping factor is then smaller than necessary, never larger.

**Theorem (sums).** Example i adds a vector of norm at most C (1 - SLACK) before rounding. If a
step has N <= EXAMPLES examples and N max(ROWS, T) <= TERMS, then the computed sums of two batches
that differ in one example differ by at most C, the other examples' arrays being the same.
*Proof.* Compare each rounded sum with the exact one. Let K = max(ROWS, T). Way 2 adds products of
matrices of at most K terms (sums for a bias: 2 K), whose magnitudes for example i have norm at most
f_i S_i <= RATIO C: over all layers and examples they err by gamma_{2K + 2} RATIO N C in norm, by
the triangle inequality. The at most N additions to the running sum, whose value is a sum of vectors
of norm at most C, err by u N each times N C. Ways 1 and 3 have magnitudes of norm at most C and at
most N terms, and the same running sum: 2 u N^2 C. Altogether, the two ways being different
coordinates, at most u C hypot(2.02 RATIO K N + N^2, 2 N^2) <= 4.2e-6 C for one sum, 8.4e-6 C for
two. Norms and factors are too small by less than 1e-8 C. So the difference is at most
C (1 - SLACK + 8.5e-6) < C. Products that wait (`Sum`) are joined up to `ROWS` terms, in blocks of
any rows: that is one product of way 2 for several, and as few additions. QED

No float32 product adds up several examples, although it is twice as fast. Adding K rows of norm at
most C in any order errs by at most v (2 + 3 + ... + K) C, the nodes of its tree in norm: over N
examples in blocks of K, added up in float64, by v N K C / 2. For two sums of 256 examples in blocks
of 64 that is 0.1 % of C, of 4096 it is 1.6 %; and a record's absence moves all others to other
blocks, so that no less can be said. In way 3 a product sums up one example, and costs nothing.

The analysis assumes that an example's own arrays do not depend on who else is in the batch. In
floating point the kernels of some processors round a row differently at another batch size; as
elsewhere (docs/privacy.md, *Floating point*), that is not covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rootnoise._check import RootnoiseError
from rootnoise.noise.engine import full_precision

SLACK = 1e-5  # fraction of the clip norm, for the rounding of sums and of float64 norms
FLOOR = 1e-6  # fraction of S^2, for the rounding of Gram norms
RATIO = 100  # S is at most this many times the norm bound of way 2
GRAM = 4_000_000_000  # most additions behind a Gram norm
ROWS = 1024  # terms of one matrix product, unless one example has more
EXAMPLES = 100_000  # most examples in a step
TERMS = 110_000_000  # most examples in a step times terms of a product
WAITING = 32  # most terms of a product that waits: of more, to make it in parts takes longer
SINGLE = 24  # fewest tokens for float32 products; with fewer, passes over arrays take longer
KEPT = (
    2.5  # arrays of examples replace taps of this fraction of their size, if they are made anyway
)
SMALL = 1 << 17  # and have at most so many numbers
HELD = 1 << 23  # numbers of a layer's such arrays that are held, 32 MB: others are made twice
CHUNK = 64  # terms of a float32 inner product
ROUGH = 1.25 * 2 * CHUNK * 2.0**-24  # fraction of S^2, for the rounding of float32 Gram norms
PIECES = 2 * (CHUNK + 4) * 2.0**-24  # relative rounding of float32 squared norms
COSTLY = 9e-4  # fraction of a norm that its float32 bound may add
SAFE = (2.0**-80, 2.0**100)  # squares whose float32 products neither underflow nor overflow
BLOCK = 1 << 21  # float64 numbers computed at a time for one product, 16 MB
CACHED = 1 << 18  # numbers computed at a time that are read once, 1 to 2 MB


class Sum:
    """A float64 vector that its first summand overwrites, which saves filling it with zeros.

    Products of at most `ROWS` terms in all may wait, as `waiting`, until the vector is needed.

    Args:
        vector: of the sum; what it holds is overwritten.
        waits: whether products may wait.

    >>> total = Sum(torch.full((2,), torch.nan, dtype=torch.float64))
    >>> add_rows_(total, torch.eye(2), torch.tensor([1.0, 2.0], dtype=torch.float64))
    >>> total.vector
    tensor([1., 2.], dtype=torch.float64)
    """

    def __init__(self, vector: torch.Tensor, waits: bool = False) -> None:
        self.vector, self.waits = vector, waits
        self.empty = True
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def weight(self) -> int:
        """Return the factor on the present values when adding the next summand: first 0, then 1."""
        waiting, self.waiting = self.waiting, []
        for left, right in waiting:
            add_product_(self, left[None], right[None])
        beta, self.empty = int(not self.empty), False
        return beta

    def wait(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        """Let the product of two arrays wait, unless it is smaller than they are; return whether.

        Args:
            left: float64, (d_out, terms).
            right: float64, (terms, d_in), which nobody else may write to.
        """
        own = left.shape[1]
        terms = own + sum(x.shape[1] for x, _ in self.waiting)
        larger = terms * (len(left) + right.shape[1]) > len(self.vector)
        if not self.waits or own > WAITING or terms > ROWS or larger:
            return False
        self.waiting.append((left, right))
        return True

    def parts(self, size: int) -> Iterator[torch.Tensor]:
        """Yield the vector in parts of about `size` numbers, each in the memory of the one before.

        Only while products wait.
        """
        left = torch.cat([x for x, _ in self.waiting], 1)
        right = torch.cat([x for _, x in self.waiting])
        width = right.shape[1]
        height = max(1, size // width)
        space = left.new_empty(min(height, len(left)), width)
        own = self.vector.view(len(left), width)
        for start in range(0, len(left), height):
            rows = left[start : start + height]
            out = space[: len(rows)]
            if self.empty:
                torch.mm(rows, right, out=out)
            else:
                torch.addmm(own[start : start + height], rows, right, out=out)
            yield out.flatten()

    def whole(self) -> torch.Tensor:
        """Return the vector, zero where nothing was added."""
        if self.weight() == 0:
            self.vector.zero_()
        return self.vector


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised float32 or float64 array.

    On a CPU numpy makes it, which asks Linux for huge pages: to touch 88 MB of fresh memory took
    6 ms, not 37 ms.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    return torch.empty(shape, dtype=dtype, device=device)


class Space:
    """Memory in which a layer's arrays are made, one micro-batch after the other.

    To touch fresh memory takes longer than to write it again, and how long depends on what else
    the machine does: with it a step of a transformer took 1.38 times the plain one, not 1.50.
    It holds gradients of examples, so it is never copied or pickled with the model.

    >>> space = Space()
    >>> first = space.take([2, 3], torch.float32, torch.device("cpu"))
    >>> second = space.take([2, 3], torch.float32, torch.device("cpu"))
    >>> space.free()
    >>> third = space.take([1, 3], torch.float32, torch.device("cpu"))
    >>> first.data_ptr() == second.data_ptr(), first.data_ptr() == third.data_ptr()
    (False, True)
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._used = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_memory": None, "_used": False}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return an uninitialised array: in this memory, unless that is taken."""
        if self._used:
            return blank(shape, dtype, device)
        size, memory = math.prod(shape), self._memory
        if memory is None or (memory.dtype, memory.device) != (dtype, device) or len(memory) < size:
            self._memory = None  # before more is asked for
            memory = self._memory = blank([size], dtype, device)
        self._used = True
        return memory[:size].view(*shape)

    def free(self) -> None:
        """Say that what was taken is no longer read."""
        self._used = False

    def drop(self) -> None:
        """Return the memory to the system."""
        self._memory, self._used = None, False


def check_size(examples: int, tokens: int) -> None:
    """Refuse a step whose sums the theorem does not cover.

    Raises:
        RootnoiseError: more than `EXAMPLES`, or than `TERMS` divided by the tokens of an example.
    """
    most = min(EXAMPLES, TERMS // max(ROWS, tokens))
    if examples > most:
        rule = f"must have at most {most} examples ({tokens} tokens each), got {examples}"
        raise RootnoiseError(f"step {rule}: more than rounding within the clip norm allows")


def example_blocks(n: int, tokens: int, width: int, most: int = BLOCK) -> Iterator[slice]:
    """Yield slices of n examples whose products have at most `ROWS` terms and fit into a block.

    Their number is a power of two: two threads make 4 products at once in less time than 5.
    """
    size = max(1, min(ROWS // max(1, tokens), most // max(1, tokens * width)))
    size = 1 << (size.bit_length() - 1)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def gram_squares(
    a: torch.Tensor,
    g: torch.Tensor,
    weight: bool,
    bias: bool,
    fold: Callable[[torch.Tensor], torch.Tensor] = lambda gram: gram,
) -> torch.Tensor:
    """Return an upper bound on each example's squared gradient norm, from Gram matrices.

    Args:
        a: inputs, (examples, groups, tokens, d_in).
        g: output gradients, (examples, groups, tokens, d_out).
        weight: whether sum_t g_t a_t^T counts.
        bias: whether sum_t g_t counts.
        fold: makes the inputs' Gram matrices of those of `a`, as sums of their entries; then a
            token is made up of several of `a`, of which there may be more or fewer.

    Returns:
        (examples,), float64, up to a relative 1e-9.
    """
    if a.shape[2] == g.shape[2] == 1:  # one token: a product of norms, without cancellation
        inputs = _squares(a) if weight else torch.zeros_like(a[..., 0], dtype=torch.float64)
        return ((inputs + int(bias)) * _squares(g)).sum((1, 2))
    if not (weight and single(a, g, g.shape[2])):
        own = fold(a.double() @ a.double().mT) if weight else None
        return _gram_bound(own, g.double() @ g.double().mT, bias, FLOOR)[0].sum(1)
    inputs, outputs = _gram_in_chunks(a), _gram_in_chunks(g)
    squares, lengths = _gram_bound(fold(inputs), outputs, bias, ROUGH)
    sure = (ROUGH * lengths <= COSTLY * squares).all(1)
    for x, gram in ((a, inputs), (g, outputs)):
        own = gram.diagonal(dim1=2, dim2=3)
        safe = (own >= SAFE[0]) & (own <= SAFE[1])
        if not bool(safe.all()):
            safe |= (x == 0).all(3)
        sure &= safe.all(2).all(1)
    total = squares.sum(1)
    if not bool(sure.all()):
        total[~sure] = gram_squares(a[~sure].double(), g[~sure].double(), weight, bias, fold)
    return total


def single(a: torch.Tensor, g: torch.Tensor, tokens: int) -> bool:
    """Return whether products of these inputs and output gradients are made in float32.

    A GPU for training multiplies float64 as fast.
    """
    float32 = a.dtype == g.dtype == torch.float32
    return float32 and a.device.type == "cpu" and tokens >= SINGLE


@contextmanager
def float32_products() -> Iterator[None]:
    """Multiply float32 as float32, whatever precision or autocast the user has set."""
    with full_precision(), torch.autocast("cpu", enabled=False):
        yield


def _gram_in_chunks(x: torch.Tensor) -> torch.Tensor:
    """Return x x^T, float64, of float32 products of `CHUNK` columns at a time."""
    with float32_products():
        parts = torch.split(x.flatten(0, 1), CHUNK, -1)  # bmm does not copy three dimensions
        gram = torch.bmm(parts[0], parts[0].mT).double()
        for part in parts[1:]:
            gram += torch.bmm(part, part.mT)
    return gram.view(*x.shape[:2], x.shape[2], x.shape[2])


def _gram_bound(
    inputs: torch.Tensor | None, outputs: torch.Tensor, bias: bool, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bound on squared norms, and S^2, (examples, groups), of Gram matrices."""
    inputs = torch.zeros_like(outputs) if inputs is None else inputs
    if bias:
        inputs = inputs + 1
    lengths = (inputs.diagonal(dim1=2, dim2=3) * outputs.diagonal(dim1=2, dim2=3)).sqrt().sum(2)
    lengths = lengths.square()
    squares = (inputs * outputs).sum((2, 3)) + floor * lengths
    return squares.maximum(lengths / RATIO**2), lengths


def row_squares(rows: torch.Tensor) -> torch.Tensor:
    """Return an upper bound on the squared norm of each row of an (examples, size) matrix, float64.

    Exact but for float64 rounding; of float32 rows on a CPU, too large by a relative `PIECES` at
    most, by the theorem on lengths.
    """
    size = rows.shape[1]
    if rows.dtype != torch.float32 or rows.device.type != "cpu" or size < CHUNK:
        return _exact_squares(rows)
    cut = size - size % CHUNK
    pieces = rows[:, :cut].reshape(len(rows), -1, CHUNK)
    total: torch.Tensor = torch.linalg.vector_norm(pieces, dim=2).double().square().sum(1)
    total = (total + _exact_squares(rows[:, cut:])) * (1 + PIECES / 2)
    sure = (total >= SAFE[0] * size) & total.isfinite()
    if not bool(sure.all()):
        total[~sure] = _exact_squares(rows[~sure])
    return total


def _square(row: torch.Tensor) -> float:
    """Return what `row_squares` does of a single row, in a third of the calls."""
    size = len(row)
    if row.dtype == torch.float32 and size % CHUNK == 0:
        lengths = torch.linalg.vector_norm(row.view(-1, CHUNK), dim=1).double()
        square = float(lengths.dot(lengths)) * (1 + PIECES / 2)
        if SAFE[0] * size <= square < math.inf:
            return square
    row = row.double()
    return float(row.dot(row))


def _exact_squares(rows: torch.Tensor) -> torch.Tensor:
    total = rows.new_zeros(len(rows), dtype=torch.float64)
    for columns in _column_blocks(rows):
        total += _squares(rows[:, columns])
    return total


def add_outer_(total: Sum, a: torch.Tensor, g: torch.Tensor, scale: torch.Tensor) -> None:
    """Add sum_i scale_i sum_t g_it a_it^T, (groups, d_out, d_in) when flat."""
    left = (g.double() * scale[:, None, None, None]).permute(1, 3, 0, 2).flatten(2)
    right = a.to(torch.float64, copy=True).permute(1, 0, 2, 3).flatten(1, 2)
    if len(left) > 1 or not total.wait(left[0], right[0]):
        add_product_(total, left, right)


def add_product_(total: Sum, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add the products of two float64 arrays, (groups, d_out, terms) and (groups, terms, d_in)."""
    out = total.vector.view(len(left), left.shape[1], right.shape[2])
    beta = total.weight()
    if len(out) == 1:
        out[0].addmm_(left[0], right[0], beta=beta)
    else:
        out.baddbmm_(left, right, beta=beta)


def add_each_(
    total: Sum,
    make: Callable[[int, torch.dtype], torch.Tensor],
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """Add scale_i times example i's float32 array, for each i; return the factors used.

    The array that is added is measured: where its squared norm, with that of its row of `bias`,
    exceeds `allowed`, from which its factor was made, the factor shrinks. Examples of factor 0 are
    left out.

    Args:
        total: the vector that they are added to.
        make: makes an example's array in a dtype, with as many numbers as `total`.
        bias: gradients of the bias, which get the same factors, (examples, size).
        scale: (examples,), float64.
        allowed: (examples,), float64.
    """
    out = total.whole()
    taken = [0.0] * len(scale) if bias is None else row_squares(bias).tolist()
    factors = scale.tolist()
    with float32_products():
        for i, most in enumerate(allowed.tolist()):
            if factors[i] == 0:
                continue
            array = make(i, torch.float32).flatten()
            square = _square(array) + taken[i]
            if not math.isfinite(square):  # beyond float32
                array = make(i, torch.float64).flatten()
                square = _square(array) + taken[i]
            if square > most:
                factors[i] *= math.sqrt(most / square)
            out.add_(array, alpha=factors[i])
    return torch.tensor(factors, dtype=torch.float64)


def add_rows_(total: Sum, rows: torch.Tensor, scale: torch.Tensor) -> None:
    """Add the rows of an (examples, size) matrix, each times its factor."""
    beta = total.weight()
    for columns in _column_blocks(rows):
        total.vector[columns].addmv_(rows[:, columns].double().mT, scale, beta=beta)


def _column_blocks(rows: torch.Tensor) -> Iterator[slice]:
    size = max(1, CACHED // max(1, len(rows)))
    for start in range(0, rows.shape[1], size):
        yield slice(start, start + size)


def _squares(x: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norms.square()
