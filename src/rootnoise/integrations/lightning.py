"""Private training with Lightning's Trainer: a callback, two lines in a script.

    from rootnoise.integrations.lightning import PrivacyCallback
    trainer = Trainer(max_epochs=3, callbacks=[PrivacyCallback(epsilon=8, delta=1e-5)])

When `fit` begins, the callback replaces the trainer's optimizer, scheduler and training data with
the private ones from `make_private`.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from torch import nn
from torch.utils.data import DataLoader

from rootnoise._check import RootnoiseError
from rootnoise.front_door import LoopOptimizer, make_private
from rootnoise.keys import Key
from rootnoise.participation.loader import Split

EPSILON = "privacy_epsilon"
# What the trainer decides: options of make_private that the callback does not take.
OURS = {"scheduler", "scheduler_interval", "epochs", "batch_size", "micro_batch_size", "resume"}


class Undivided(ClosureResult):
    """A loss that is not divided by the number of parts: each example's gradient stays its own."""

    @classmethod
    def from_training_step_output(cls, training_step_output: Any, normalize: int = 1) -> Any:
        """Return the loss as `training_step` made it."""
        return super().from_training_step_output(training_step_output, 1)


class Calls:
    """Whether a model was called in training mode, since it was last asked.

    The hook holds no reference to the callback: autograd's graph keeps hooks alive where the
    garbage collector does not see them, and the optimizer would live as long.
    """

    def __init__(self) -> None:
        self.made = False

    def __call__(self, model: nn.Module, args: Any) -> None:
        """Note a call; the signature is that of a forward pre-hook."""
        self.made = self.made or model.training


class PrivacyCallback(Callback):
    """Makes a Trainer's `fit` private; the number of epochs or steps is the trainer's.

    Automatic and manual optimization both work, with one process, one optimizer, and one step per
    batch. `accumulate_grad_batches=k` makes one step of k times the loader's batch size, whose
    batch is given in k parts. The `training_step` must call the trained module once: either itself,
    `self(x)`, or its one child that holds all trainable parameters. The progress bar shows
    `privacy_epsilon`, which is logged after each epoch.

    A checkpoint of the trainer holds the noise key and the batches' seed, so that
    `fit(ckpt_path=...)` continues bit for bit: keep it as secret as the data. To publish, save
    `module.state_dict()`, or a checkpoint with `weights_only=True`.

    Args:
        epsilon: privacy loss of the whole run, for one record.
        delta: its failure probability.
        clip_norm: largest l2 norm of one record's gradient.
        options: passed to `rootnoise.make_private`: mechanism, sampling, loss_reduction, key etc.

    Attributes:
        optimizer: the private optimizer, once fit has begun; its `claim()` is the guarantee.
    """

    def __init__(
        self, *, epsilon: float, delta: float, clip_norm: float = 1.0, **options: Any
    ) -> None:
        super().__init__()
        ours = OURS & set(options)
        if ours:
            raise RootnoiseError(
                f"options must leave to the trainer what it knows, got {', '.join(sorted(ours))}"
            )
        self.settings = {"epsilon": epsilon, "delta": delta, "clip_norm": clip_norm} | options
        self._loop: LoopOptimizer | None = None
        self._told, self._calls = False, Calls()
        self._parts = 1

    @property
    def optimizer(self) -> LoopOptimizer:
        """The private optimizer of the last fit."""
        if self._loop is None:
            raise RootnoiseError("optimizer must be asked for after fit has begun, got it before")
        return self._loop

    # ------------------------------------------------------------------------- of the trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings of the trainer that would touch raw gradients, or leave batches out."""
        if stage != "fit":
            return
        whole = trainer.limit_train_batches in (None, 1.0) or bool(
            getattr(trainer, "fast_dev_run", False)
        )
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        rules = {
            "gradient_clip_val": (
                not trainer.gradient_clip_val,
                "None, for each record's gradient is clipped by clip_norm",
                trainer.gradient_clip_val,
            ),
            "devices": (
                trainer.world_size == 1,
                "1, for Lightning would add up raw gradients (PrivateOptimizer takes a process "
                "group)",
                trainer.world_size,
            ),
            "precision": (not scaled, "32-true or bf16-mixed, without a scaler", trainer.precision),
            "limit_train_batches": (
                whole,
                "1.0, for an epoch takes every batch that was planned",
                trainer.limit_train_batches,
            ),
        }
        for name, (kept, rule, got) in rules.items():
            if not kept:
                raise RootnoiseError(f"{name} must be {rule}, got {got}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the trainer's optimizer and loader with the private ones."""
        fit, strategy = trainer.fit_loop, trainer.strategy
        if len(strategy.optimizers) != 1:
            n = len(strategy.optimizers)
            raise RootnoiseError(f"configure_optimizers must return one optimizer, got {n}")
        data = fit._data_source.dataloader()
        if not isinstance(data, DataLoader):
            kind = type(data).__name__
            raise RootnoiseError(f"training data must be one DataLoader, got {kind}")
        self._parts = trainer.accumulate_grad_batches
        batch_size = (data.batch_size or 1) * self._parts
        model, self._loop, loader = make_private(
            _trained(pl_module),
            strategy.optimizers[0],
            data,
            epochs=_epochs(trainer, -(-len(data.dataset) // batch_size)),  # type: ignore[arg-type]
            batch_size=None if data.batch_size is None else batch_size,
            **self.settings,
            **_schedule(trainer),
        )
        model.register_forward_pre_hook(self._calls)
        strategy.optimizers = [self._loop]
        fit._data_source.instance = loader.divided(Split(self._parts))
        fit.epoch_loop.automatic_optimization.output_result_cls = Undivided
        fit._combined_loader = None  # the trainer may have built it to count steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the forward of this batch, or part of one."""
        self._calls.made = False
        if trainer.accumulate_grad_batches != self._parts:
            raise RootnoiseError(
                f"accumulate_grad_batches must stay {self._parts}, got "
                f"{trainer.accumulate_grad_batches}: batches of another size need another plan"
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, _: Any) -> None:
        """Refuse layers that `training_step` calls one by one, before their backward."""
        if trainer.training and not self._calls.made:
            raise RootnoiseError(
                "training_step must call `self(x)`, or the one child that is trained, and no part "
                "of it alone, got no such call: put its calls into forward"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a part of a batch to its sum; warn once that epsilon does not cover metrics."""
        if self._loop is not None and self._loop.more:
            self._loop.accumulate()
        if self._told:
            return
        logged = {name.partition(".")[2] for name in trainer.fit_loop._results} - {EPSILON}
        if logged:
            self._told = True
            warnings.warn(
                f"training_step logs {', '.join(sorted(logged))}, computed from raw data: epsilon "
                "does not cover that, so log validation metrics instead, or keep it as secret as "
                "the data",
                stacklevel=2,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epsilon spent so far."""
        pl_module.log(EPSILON, self.optimizer.epsilon_spent(), prog_bar=True)

    # ------------------------------------------------------------------------- of checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the key, without which a run cannot be resumed."""
        return {"key": self.optimizer.private.stream.key.secret.hex()} if self._loop else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the key of the run to resume."""
        self.settings["key"] = Key(bytes.fromhex(state_dict["key"]))


def _epochs(trainer: Trainer, period: int) -> int:
    """Return the largest number of epochs, of `period` steps each, that the trainer may run."""
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs)
    if trainer.max_steps > 0:
        limits.append(-(-trainer.max_steps // period))
    if not limits:
        raise RootnoiseError(
            "max_epochs or max_steps must be given, for the noise is planned for all steps, got "
            f"max_epochs={trainer.max_epochs}"
        )
    return min(limits)


def _schedule(trainer: Trainer) -> dict[str, Any]:
    """Return the scheduler of the learning rate and how often it steps."""
    configs = trainer.strategy.lr_scheduler_configs
    if not configs:
        return {}
    if len(configs) > 1 or configs[0].frequency != 1:
        raise RootnoiseError(
            "scheduler must be one that steps at every step or epoch, got "
            f"{len(configs)} with frequency {configs[0].frequency}"
        )
    return {"scheduler": configs[0].scheduler, "scheduler_interval": configs[0].interval}


def _trained(pl_module: LightningModule) -> nn.Module:
    """Return the module that `training_step` calls: the one trained child, or the whole module."""
    holders = [c for c in pl_module.children() if any(p.requires_grad for p in c.parameters())]
    own = any(p.requires_grad for p in pl_module.parameters(recurse=False))
    if own or len(holders) != 1 or isinstance(holders[0], nn.ModuleList | nn.ModuleDict):
        return pl_module
    inside = set(holders[0].modules())
    for name, layer in pl_module.named_modules():
        mixes = isinstance(layer, nn.modules.batchnorm._BatchNorm) or getattr(
            layer, "track_running_stats", False
        )
        if layer not in inside and layer.training and mixes:
            raise RootnoiseError(
                f"layer {name} must be in evaluation mode, for its statistics mix examples, got "
                f"{type(layer).__name__} in training mode"
            )
    return holders[0]
