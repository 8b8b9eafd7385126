"""Standard normals by position: pure functions of (key, step, chunk), and of no global generator.

`AesSource`, for the CPU, is cryptographic and yet as fast as `torch.randn`; a separate fast source
would gain nothing there. `CudaSource`, for the GPU, is torch's own Philox, keyed. A seeded CPU
generator of torch would not do: its mt19937 keeps only the low 32 bits of the seed (torch 2.13
gives equal draws for s and s + 2**32), and its float32 normals stop at 5.77.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from rootnoise._check import RootnoiseError, integer
from rootnoise.keys import Key

Rows = Any
"""Float32 rows: NumPy arrays on the CPU, where small calls cost less, tensors on a GPU."""


class NoiseSource(Protocol):
    """What `NoiseStream` asks of a source, which it builds as `source(key, device)`.

    A stream builds one for each of its threads, and none is used by two.
    """

    @property
    def chunk(self) -> int:
        """Positions in a chunk: part of the definition of Z."""

    @property
    def name(self) -> str:
        """Names the algorithm; a saved stream is not continued with another one."""

    def fill(self, t: int, chunks: Sequence[int], out: Rows) -> None:
        """Write the normals of steps t, t + 1, ... of whole chunks.

        `out` has shape (len(chunks), steps, chunk) and is contiguous in its last dimension. Row
        [i, j] depends on (key, t + j, chunks[i]) alone.
        """


class AesSource:
    """The secure source: AES-256 in counter mode, through the transform of Box and Muller (1958).

    The 128-bit counter holds the chunk in its upper half and (step, block of 16 bytes) in its lower
    one, so that no two draws of a run share a word; the words of q blocks are told from random ones
    with advantage at most q^2 / 2^129, besides breaking AES: 2^-57 for q = 2^36, a terabyte. A pair
    of normals takes 96 bits: 64 for the radius, 32 for the angle. The largest normal is
    sqrt(126 ln 2) = 9.345, which a true one exceeds with probability 1e-20.

    It protects against an adversary who sees noise, of other steps or positions, and would predict
    the rest. It does not protect against one who holds the key, nor, as every float32 sampler,
    against attacks on the lattice of floating-point numbers (Mironov, 2012, "On significance of the
    least significant bits for differential privacy"; Holohan and Braghin, 2021, "Secure random
    sampling in differential privacy"): the guarantee is that of real-valued noise. The words are
    the same everywhere; log, tan and sqrt of another processor may round their last bit otherwise.

    Raises:
        RootnoiseError: a device other than the CPU.
    """

    name = "aes256ctr-boxmuller32"
    # Of 1,024 to 16,384: smaller ones lose time between calls, spans cut more off larger ones.
    chunk = 4096

    _PAIRS = chunk // 2
    _STEP_BYTES = 12 * _PAIRS
    _STEP_BLOCKS = _STEP_BYTES // 16
    # Rows transformed at once: measured, half or twice as many are no faster. Operations on 32,768
    # pairs stay in the cache and are not split over torch's own threads.
    _ROWS = 16

    def __init__(self, key: Key, device: str | torch.device = "cpu") -> None:
        if torch.device(device).type != "cpu":
            raise RootnoiseError(
                f"device of AES noise must be cpu (memory='offload' delivers it), got {device}"
            )
        cipher = Cipher(algorithms.AES(key.derive("aes").secret), modes.CTR(bytes(16)))
        self._cipher = cipher.encryptor()
        words = np.empty((self._ROWS, self._STEP_BYTES), dtype=np.uint8)
        self._words = words.data.cast("B")
        self._zeros = memoryview(bytes(words.size))
        self._radius_words = words[:, : 8 * self._PAIRS].view("<i8")
        self._angle_words = words[:, 8 * self._PAIRS :].view("<i4")
        # One memory, seen by torch for its log and tan and by NumPy for cheaper calls.
        self._tensors = torch.empty(3, self._ROWS, self._PAIRS, dtype=torch.float32, device="cpu")
        self._arrays = self._tensors.numpy()
        self._least = torch.tensor(2.0**-126, dtype=torch.float32, device="cpu")
        self._half = torch.tensor(0.5, dtype=torch.float32, device="cpu")

    def fill(self, t: int, chunks: Sequence[int], out: Rows) -> None:
        """Write whole chunks of the steps from t on, as `NoiseSource` says."""
        n_chunks, n_steps, _ = out.shape
        for step in range(0, n_steps, self._ROWS):
            steps = min(self._ROWS, n_steps - step)
            height = self._ROWS // steps
            for i in range(0, n_chunks, height):
                self._draw(t + step, chunks[i : i + height], steps)
                self._transform(out[i : i + height, step : step + steps])

    def _draw(self, t: int, chunks: Sequence[int], steps: int) -> None:
        """Fill the words with the key stream: steps of a chunk follow each other in it."""
        size = steps * self._STEP_BYTES
        for i, chunk in enumerate(chunks):
            self._cipher.reset_nonce(struct.pack(">QQ", chunk, t * self._STEP_BLOCKS))
            words = self._words[i * size : (i + 1) * size]
            self._cipher.update_into(self._zeros[:size], words)

    def _transform(self, out: Rows) -> None:
        """Write r cos(a) and r sin(a), with u = tan(a / 2): one trigonometric function, not two."""
        n = out.shape[0] * out.shape[1]
        r, u, q = self._arrays[:, :n]
        r_, u_, q_ = self._tensors[:, :n]
        np.copyto(r, self._radius_words[:n], casting="unsafe")
        # -2 log |w / 2^63| from the square of the signed word w; w = 0 counts as 1.
        torch.addcmul(self._least, r_, r_, value=2.0**-126, out=r_)
        torch.log(r_, out=r_)
        np.negative(r, out=r)
        np.sqrt(r, out=r)
        np.multiply(
            self._angle_words[:n],
            np.float32(math.pi / 2**32),
            out=u,
            dtype=np.float32,
            casting="unsafe",
        )
        torch.tan(u_, out=u_)
        # q = 2 r / (1 + u^2): then r cos(a) = q - r and r sin(a) = u q.
        torch.addcmul(self._half, u_, u_, value=0.5, out=q_)
        np.divide(r, q, out=q)
        shape = (*out.shape[:2], self._PAIRS)
        np.subtract(q.reshape(shape), r.reshape(shape), out=out[..., : self._PAIRS])
        np.multiply(u.reshape(shape), q.reshape(shape), out=out[..., self._PAIRS :])


class CudaSource:
    """The fast source of a GPU: torch's Philox4x32-10, keyed with 64 bits, and its own normals.

    Philox counts: (step, chunk) is the place in one stream, so no two draws of a run share a word.
    It passes statistical tests but is no cryptographic generator, and two of n runs share their
    64-bit seed with probability n^2 / 2^65: to withstand an adversary who looks for either, use
    memory="offload" with the secure source. Its uniforms have 32 bits, its largest normal is 6.76,
    and which word goes where depends on the model of the GPU, which therefore is in the name.

    Raises:
        RootnoiseError: a device that is no GPU.
    """

    # A launch takes some microseconds, in which an H100 draws about this many normals.
    chunk = 2**18

    def __init__(self, key: Key, device: str | torch.device = "cuda") -> None:
        if torch.device(device).type != "cuda":
            raise RootnoiseError(f"device of CUDA noise must be a GPU, got {device}")
        self._seed = key.derive("cuda").secret[:8]
        self._generator = torch.Generator(device)
        self.name = f"philox4x32-10 {torch.cuda.get_device_name(device)}"

    def fill(self, t: int, chunks: Sequence[int], out: Rows) -> None:
        """Write whole chunks of the steps from t on, as `NoiseSource` says."""
        for row, chunk in zip(out, chunks, strict=True):
            for j, normals in enumerate(row):
                state = philox_state(self._seed, t + j, chunk)
                self._generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
                normals.normal_(generator=self._generator)


def philox_state(seed: bytes, t: int, chunk: int) -> bytes:
    """Return the state of a CUDA generator at the place of (t, chunk): seed, then offset.

    The offset counts words of a thread. A chunk takes 4 of them for each round of the kernel, at
    most 128 on a GPU of a single multiprocessor; it gets 256.

    Raises:
        RootnoiseError: t or chunk does not fit its bits of the offset.
    """
    t = integer("t", t, 0, 2**32 - 1)
    chunk = integer("chunk", chunk, 0, 2**23 - 1)
    return seed + struct.pack("=q", (chunk << 32 | t) << 8)
