"""Privacy bugs that were thought of: the tests must catch each (`mutate.py` plants them).

A mutation names a file, a text that occurs in it exactly once, what replaces it, and the tests that
must fail then; where the source has moved on, `test_mutations.py` fails within seconds. A new bug
goes to the end of its section.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rootnoise"


@dataclass(frozen=True)
class Mutation:
    """A bug: `old` becomes `new` in a file of the package, and `tests` (files of tests/) fail."""

    bug: str
    file: str
    old: str
    new: str
    tests: str

    def apply(self, text: str) -> str:
        """Return the text with the bug, or refuse a text that `old` does not occur in once."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.bug}: {self.file} holds {text.count(self.old)} of {self.old!r}"
            )
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {self.bug}"


MUTATIONS = [
    # ------------------------------------------------------------------------------- gradients
    Mutation(
        "clips at twice the norm",
        "training/clipping.py",
        "(clip.norm / (norms * (1 + SLACK)))",
        "(2 * clip.norm / (norms * (1 + SLACK)))",
        "clipping",
    ),
    Mutation(
        "never clips",
        "training/clipping.py",
        ".clamp(max=1)\n    return (factor",
        ".clamp(min=1)\n    return (factor",
        "clipping",
    ),
    Mutation(
        "lets infinite gradients through",
        "training/clipping.py",
        "finite = norms.isfinite()",
        "finite = norms == norms",
        "clipping",
    ),
    Mutation(
        "norms of float32 sums over long rows",
        "training/clipping.py",
        "SLACK = 1e-5",
        "SLACK = 0.0",
        "clipping",
    ),
    Mutation(
        "clips each parameter by itself",
        "training/clipping.py",
        "torch.stack(squares).sum(0).sqrt()",
        "torch.stack(squares).amax(0).sqrt()",
        "clipping",
    ),
    Mutation(
        "no noise",
        "training/replicated.py",
        "clip.noised(total[own], noise, out=total[own])",
        "clip.noised(total[own], 0 * noise, out=total[own])",
        "training",
    ),
    Mutation(
        "noise scaled by the batch",
        "training/replicated.py",
        "clip.noised(total[own], noise, out=total[own])",
        "clip.noised(total[own], noise / max(rows, 1), out=total[own])",
        "training",
    ),
    Mutation(
        "the divisor is the actual batch size",
        "training/optimizer.py",
        "total.div_(self.sampler.batch_size)",
        "total.div_(max(part.size, 1))",
        "training",
    ),
    Mutation(
        "no noise on empty batches",
        "training/optimizer.py",
        "self._place.write(total.div_(self.sampler.batch_size))",
        "self._place.write(total.mul_(min(part.size, 1)).div_(self.sampler.batch_size))",
        "training",
    ),
    Mutation(
        "batches of other indices pass",
        "training/replicated.py",
        "if found != rows:",
        "if found < rows:",
        "training_refusals",
    ),
    Mutation(
        "a step past the mechanism's last",
        "training/optimizer.py",
        'integer("t", self.t, 0, self.mechanism.n_steps - 1,',
        'integer("t", self.t, 0, self.mechanism.n_steps,',
        "training_refusals",
    ),
    Mutation(
        "the optimizer resumes after a step",
        "training/optimizer.py",
        "if self.t or self.ledger.t or self.stream.t:",
        "if False:",
        "training_resume",
    ),
    Mutation(
        "clipped values are not whole numbers",
        "training/clipping.py",
        "            cut -= cut.frac()  # exact",
        "            pass  # exact",
        "clipping",
    ),
    Mutation(
        "clipped values are added up in float32",
        "training/clipping.py",
        "cut.sum(0, dtype=torch.float64)",
        "cut.sum(0)",
        "clipping",
    ),
    Mutation(
        "sums of more examples than the data set fit",
        "training/clipping.py",
        "largest = max(clip_range(norm) * n_examples,",
        "largest = max(clip_range(norm),",
        "clipping",
    ),
    # ---------------------------------------------------------------------- what a step relies on
    Mutation(
        "two forwards in a step",
        "training/guards.py",
        "if n > 1 or (rows and n == 0):",
        "if rows and n == 0:",
        "guards",
    ),
    Mutation(
        "a second backward of a forward",
        "training/guards.py",
        "elif one.task != task:",
        "elif False:",
        "guards",
    ),
    Mutation(
        "a backward that broke off",
        "training/guards.py",
        "if rows and not self._passes[0].finished:",
        "if rows and self._passes[0].task is None:",
        "guards",
    ),
    Mutation(
        "the backward of a forward that was dropped",
        "training/guards.py",
        "        if one.dropped:\n            raise",
        "        if False:\n            raise",
        "guards",
    ),
    Mutation(
        "per-sample gradients put in by hand",
        "training/guards.py",
        "now is not then or _version(now) != v\n",
        "False\n",
        "guards",
    ),
    Mutation(
        "a layer called by itself",
        "training/guards.py",
        '            self._fault = f"layer {name} {rule} (else',
        '            _ = f"layer {name} {rule} (else',
        "guards",
    ),
    Mutation(
        "versions of buffers are not compared",
        "training/guards.py",
        "if _version(now) != self.version or now.data_ptr() != self.place:",
        "if now.data_ptr() != self.place:",
        "guards",
    ),
    Mutation(
        "buffers are not watched",
        "training/guards.py",
        "        yield from self._model.named_buffers(remove_duplicate=False)\n",
        "",
        "guards",
    ),
    Mutation(
        "hidden writes are not looked for",
        "training/guards.py",
        "return then is None or bool((",
        "return True or bool((",
        "guards",
    ),
    Mutation(
        "a backward that was dropped still counts",
        "training/guards.py",
        "            one.dropped = True",
        "            one.dropped = False",
        "guards",
    ),
    Mutation(
        "the probe replaces nobody",
        "training/probe.py",
        "source = generator.choice(stays, rows)",
        "source = np.arange(rows)",
        "probe_mixing",
    ),
    Mutation(
        "the probe's tolerance is a thousand times as large",
        "training/probe.py",
        "TOLERANCE = 100  #",
        "TOLERANCE = 100_000  #",
        "probe",
    ),
    Mutation(
        "the probe does not look at the loss",
        "training/probe.py",
        "if any(_differ(a, b, self.rows, kept) for a, b in ends):",
        "if False:",
        "probe_mixing",
    ),
    Mutation(
        "the probe does not look at layers",
        "training/probe.py",
        "            if _differ(old, new, self.rows, kept):\n                got =",
        "            if False:\n                got =",
        "probe_mixing",
    ),
    Mutation(
        "the probe keeps what it has found to itself",
        "training/probe.py",
        "        if refusal:\n            raise RootnoiseError(refusal)\n",
        "",
        "probe",
    ),
    Mutation(
        "a probe that has shown nothing counts",
        "training/probe.py",
        "return planned or not (self.probed or self._sharded)",
        "return planned",
        "probe",
    ),
    Mutation(
        "labels are not replaced",
        "training/tape.py",
        "if self._source is not None and id(t) in self._labels:",
        "if False:",
        "probe_mixing",
    ),
    Mutation(
        "a number that left torch is forgotten",
        "training/tape.py",
        "if call.leaves_torch and not _equal(result, call.result):",
        "if False:",
        "probe_mixing",
    ),
    Mutation(
        "writes into labels are forgotten",
        "training/tape.py",
        "if first is t and t._version != self._tape._versions",
        "if False and t._version != self._tape._versions",
        "probe",
    ),
    # ------------------------------------------------------------------------------------- noise
    Mutation(
        "half the noise",
        "noise/stream.py",
        "float(self._mechanism.noise_std))\n        self.t",
        "0.5 * float(self._mechanism.noise_std))\n        self.t",
        "noise",
    ),
    Mutation(
        "the same noise at every step of a block",
        "noise/sources.py",
        'struct.pack(">QQ", chunk, t * self._STEP_BLOCKS)',
        'struct.pack(">QQ", chunk, 0)',
        "noise normals",
    ),
    Mutation(
        "the same noise in every chunk",
        "noise/sources.py",
        'struct.pack(">QQ", chunk, t * self._STEP_BLOCKS)',
        'struct.pack(">QQ", 0, t * self._STEP_BLOCKS)',
        "noise normals",
    ),
    Mutation(
        "steps that share words",
        "noise/sources.py",
        "_STEP_BLOCKS = _STEP_BYTES // 16",
        "_STEP_BLOCKS = _STEP_BYTES // 32",
        "noise normals",
    ),
    Mutation(
        "off by one in t",
        "noise/engine.py",
        "self._source.fill(t - past, list(group)",
        "self._source.fill(t - past + 1, list(group)",
        "noise",
    ),
    Mutation(
        "the ring is read backwards",
        "noise/stream.py",
        "row = self._memory[self._ready[self.t - self._made]]",
        "row = self._memory[self._ready[self._made - self.t - 1]]",
        "noise",
    ),
    Mutation(
        "the state of a block is lost",
        "noise/stream.py",
        "self._state, self._ready, self._made = block.state,",
        "self._state, self._ready, self._made = block.state[::-1],",
        "noise",
    ),
    Mutation(
        "another mechanism shares the noise",
        "noise/stream.py",
        'self.key.derive(f"noise {mechanism.fingerprint}")',
        'self.key.derive("noise")',
        "noise",
    ),
    Mutation(
        "the key's entropy is a constant",
        "keys.py",
        "return cls(secrets.token_bytes(32))",
        "return cls(bytes(32))",
        "randomness",
    ),
    Mutation(
        "every purpose gets the same key",
        "keys.py",
        "purpose.encode(), key=self.secret",
        'b"", key=self.secret',
        "randomness",
    ),
    Mutation(
        "the key can be read by all",
        "keys.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)",
        "randomness",
    ),
    Mutation(
        "float32 arrays longer than their norm bound are added as they are",
        "training/clip/bounds.py",
        "if square > most:",
        "if False:",
        "clip_bounds",
    ),
    Mutation(
        "float32 Gram norms without a bound of their rounding",
        "training/clip/bounds.py",
        "ROUGH = 1.25 * 2 *",
        "ROUGH = 0 *",
        "clip_bounds",
    ),
    Mutation(
        "two optimizers release two gradients under one noise",
        "training/reuse.py",
        'return any(other not in (b"", digest) for other in found)',
        "return False",
        "reuse",
    ),
    Mutation(
        "releases that differ in their order pass for the same",
        "training/reuse.py",
        "weighted += sums",
        "weighted += bits",
        "reuse",
    ),
    Mutation(
        "stream and ledger at different steps on load",
        "training/optimizer.py",
        "if not stream.t == ledger.t == t:",
        "if not ledger.t == t:",
        "training_resume",
    ),
    # ------------------------------------------------------------------------------- sensitivity
    Mutation(
        "the square of the sensitivity",
        "participation/sensitivity.py",
        "return float(np.sqrt(square))",
        "return float(square)",
        "sensitivity",
    ),
    Mutation(
        "p > b counted as p <= b",
        "participation/sensitivity.py",
        "if strategy.bands <= participation.min_sep:",
        "if True:",
        "sensitivity",
    ),
    Mutation(
        "bands off by one",
        "participation/sensitivity.py",
        "if strategy.bands <= participation.min_sep:",
        "if strategy.bands <= participation.min_sep + 1:",
        "sensitivity",
    ),
    Mutation(
        "k off by one",
        "participation/sensitivity.py",
        "envelope[: k * b : b]",
        "envelope[: (k - 1) * b : b]",
        "sensitivity",
    ),
    Mutation(
        "an identity strategy is of sensitivity 1",
        "participation/sensitivity.py",
        "    if participation.max_participations == 1:",
        "    if participation.max_participations == 1 or strategy.bands == 1:",
        "sensitivity",
    ),
    Mutation(
        "increasing coefficients taken for non-increasing",
        "participation/sensitivity.py",
        "if np.all(c[1:] <= c[:-1]):",
        "if True:",
        "sensitivity",
    ),
    Mutation(
        "overlapping columns amplified",
        "participation/sensitivity.py",
        "if strategy.bands > most:",
        "if strategy.bands > most + 1:",
        "sensitivity",
    ),
    # -------------------------------------------------------------------------------- accounting
    Mutation(
        "the last epoch is forgotten",
        "participation/kinds.py",
        "return -(-n_steps // self.groups)",
        "return n_steps // self.groups",
        "participation accounting",
    ),
    Mutation(
        "epsilon rounded down",
        "accounting/gaussian.py",
        "MARGIN = 1e-11",
        "MARGIN = -1e-6",
        "accounting_cost",
    ),
    Mutation(
        "twice the delta",
        "accounting/gaussian.py",
        "mu, goal = 1 / sigma, math.log(delta) - MARGIN",
        "mu, goal = 1 / sigma, math.log(2 * delta) - MARGIN",
        "accounting_composition",
    ),
    Mutation(
        "losses of a step rounded down",
        "accounting/subsampled.py",
        "(np.expm1(-above) / math.expm1(-width))",
        "0.5 * (np.expm1(-above) / math.expm1(-width))",
        "accounting_composition",
    ),
    Mutation(
        "losses beyond the grid are lost",
        "accounting/subsampled.py",
        "masses * (1 + short), tail,",
        "masses * (1 + short), 0.0,",
        "accounting_composition",
    ),
    Mutation(
        "the transform is taken to be exact",
        "accounting/composition.py",
        "float(np.linalg.norm(errors)) * 1.01",
        "0.0",
        "accounting_composition",
    ),
    Mutation(
        "the add direction is dropped, losses",
        "accounting/gaussian.py",
        "for add in (False, True))",
        "for add in (False, False))",
        "accounting_composition",
    ),
    Mutation(
        "the add direction is dropped, Monte Carlo",
        "accounting/monte_carlo.py",
        "return found if added.bound(found) <= delta else _root(added.bound, delta)",
        "return found",
        "monte_carlo_bounds",
    ),
    Mutation(
        "half the sampling probability",
        "accounting/run.py",
        "gaussian.poisson_cost(sigma, q, rounds, delta)",
        "gaussian.poisson_cost(sigma, q / 2, rounds, delta)",
        "accounting",
    ),
    Mutation(
        "amplified bands are not checked",
        "accounting/run.py",
        "    refuse_misfit(strategy, participation)\n",
        "",
        "accounting_cost",
    ),
    Mutation(
        "waits 3 % likelier",
        "batches/samplers.py",
        "rng.geometric(p, who.size)",
        "rng.geometric(min(1, 1.03 * p), who.size)",
        "monte_carlo_bounds",
    ),
    Mutation(
        "C for |C|",
        "accounting/min_sep_poisson.py",
        "magnitudes(strategy).by_diagonals()",
        "strategy.by_diagonals()",
        "monte_carlo_bounds",
    ),
    Mutation(
        "the bound is from the pilot's stream",
        "accounting/monte_carlo.py",
        "_stream(settings, 1, evaluation)",
        "_stream(settings, 0)",
        "monte_carlo_bounds",
    ),
    Mutation(
        "failure is not halved",
        "accounting/monte_carlo.py",
        "settings.failure / 2, settings.samples\n",
        "settings.failure, settings.samples\n",
        "monte_carlo_bounds",
    ),
    Mutation(
        "failure is not divided by the attempts",
        "accounting/run.py",
        "run.settings.failure / ATTEMPTS",
        "run.settings.failure",
        "monte_carlo_bounds",
    ),
    Mutation(
        "ln(1/f) for ln(2/f)",
        "accounting/confidence.py",
        "math.log(2 / failure)",
        "math.log(1 / failure)",
        "monte_carlo_bounds",
    ),
    Mutation(
        "every noise multiplier draws the same samples",
        "accounting/run.py",
        "delta, attempt, bits)",
        "delta, attempt)",
        "monte_carlo_bounds",
    ),
    # --------------------------------------------------------------------------------- mechanism
    Mutation(
        "the clip norm is left out of the noise",
        "mechanism.py",
        "return self.noise_multiplier * self.clip_norm * self.sensitivity.value",
        "return self.noise_multiplier * self.sensitivity.value",
        "mechanism",
    ),
    Mutation(
        "the sensitivity is left out of the noise",
        "mechanism.py",
        "return self.noise_multiplier * self.clip_norm * self.sensitivity.value",
        "return self.noise_multiplier * self.clip_norm",
        "mechanism",
    ),
    Mutation(
        "edits of a mechanism pass",
        "mechanism.py",
        '        _refuse_edits(mechanism.to_dict(), fields, "")\n',
        "",
        "mechanism",
    ),
    # ------------------------------------------------------------------------ batches and ledger
    Mutation(
        "more people than the probability",
        "batches/samplers.py",
        "random(part.size) < self.participation.probability",
        "random(part.size) < 1.02 * self.participation.probability",
        "sampling",
    ),
    Mutation(
        "the same draws at every step",
        "batches/samplers.py",
        "self._draws.generator(t).random",
        "self._draws.generator(0).random",
        "sampling",
    ),
    Mutation(
        "the accountant is given another probability",
        "batches/samplers.py",
        "CyclicPoisson(groups, drawn / size)",
        "CyclicPoisson(groups, drawn / (size + 1))",
        "sampling",
    ),
    Mutation(
        "the ledger is off by one",
        "batches/ledger.py",
        "broken = (gap < self._least)",
        "broken = (gap < self._least - 1)",
        "ledger",
    ),
    Mutation(
        "the ledger counts one too many",
        "batches/ledger.py",
        "| (count >= self._most)",
        "| (count > self._most)",
        "ledger",
    ),
    Mutation(
        "off the cycle",
        "batches/ledger.py",
        "| (gap % self._modulus != 0)",
        "",
        "ledger",
    ),
    Mutation(
        "a crash lets another batch use the same noise",
        "batches/ledger.py",
        "elif before not in (None, record):",
        "elif False:",
        "ledger",
    ),
    Mutation(
        "the ledger can be read by all",
        "batches/ledger_file.py",
        "write_whole(path, first_line(header), 0o600)",
        "write_whole(path, first_line(header), 0o644)",
        "ledger",
    ),
    Mutation(
        "the digest is not salted",
        "batches/ledger.py",
        "return hashlib.blake2b(text + record, key=key, digest_size=32)",
        "return hashlib.blake2b(text + record, digest_size=32)",
        "ledger",
    ),
    Mutation(
        "own batches under amplification",
        "batches/samplers.py",
        "        if participation.amplified:\n",
        "        if False:\n",
        "batches",
    ),
    Mutation(
        "a subclass draws as it likes",
        "batches/samplers.py",
        "type(sampler) not in DRAWN",
        "not isinstance(sampler, DRAWN)",
        "batches",
    ),
    Mutation(
        "seeds of 16 bits",
        "batches/samplers.py",
        "secrets.randbits(128)",
        "secrets.randbits(16)",
        "batches",
    ),
    Mutation(
        "bins are not uniform",
        "batches/samplers.py",
        ".integers(period, size=self.n_examples)",
        ".integers(period + 1, size=self.n_examples) % period",
        "sampling",
    ),
    Mutation(
        "a public seed draws balls in bins",
        "runs/config.py",
        "BallsInBinsSampler(size, batch, epochs, secret)",
        "BallsInBinsSampler(size, batch, epochs, config.seed)",
        "batches",
    ),
    Mutation(
        "a public seed draws Poisson",
        "runs/config.py",
        "CyclicPoissonSampler(size, batch, steps, config.groups, secret)",
        "CyclicPoissonSampler(size, batch, steps, config.groups, config.seed)",
        "batches",
    ),
    Mutation(
        "the batch is not the sampler's",
        "batches/ledger.py",
        "if drawn is not None and not np.array_equal(batch, drawn):",
        "if False:",
        "batches",
    ),
    Mutation(
        "the optimizer does not tell what was drawn",
        "training/optimizer.py",
        "batch, None if own else self.sampler.batch(self.t))",
        "batch, None)",
        "batches",
    ),
    Mutation(
        "a state is loaded into a ledger that is kept",
        "batches/ledger.py",
        "        self.check_unkept()\n        same(",
        "        same(",
        "ledger journal",
    ),
    Mutation(
        "gaps of a batch are cut to 16 bits",
        "batches/ledger_file.py",
        "bits = np.zeros((size, 32), dtype=np.uint8)",
        "width = min(width, 16)\n    bits = np.zeros((size, 32), dtype=np.uint8)",
        "ledger",
    ),
    # ----------------------------------------------------------------------------------- the run
    Mutation(
        "secrets are left behind",
        "runs/folder.py",
        'SECRETS = ("checkpoint.pt", "noise.key")',
        'SECRETS = ("checkpoint.pt",)',
        "runs",
    ),
]
