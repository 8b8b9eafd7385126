"""Lightning's Trainer with the callback makes the very run of `make_private`, or is refused."""

import gc
import runpy
import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from hosts import Recorder, white
from rootnoise import Key, RootnoiseError, make_private
from rootnoise.integrations.lightning import PrivacyCallback

GOAL = {"epsilon": 8.0, "delta": 1e-5, "mechanism": "bsr"}
EPOCHS, STEPS = 2, 3

# What Lightning says of itself; what rootnoise says stays an error.
pytestmark = [
    pytest.mark.filterwarnings(text)
    for text in (
        "ignore:.*LeafSpec",
        "ignore:Be aware that when using `ckpt_path`",
        "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    )
]


def data(width=5):
    rng = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, width, generator=rng), torch.arange(24) % 2)


def loader(width=5):
    return DataLoader(data(width), batch_size=8, shuffle=True)


class Lit(lightning.LightningModule):
    """As in Lightning's own introduction; what a test changes is an argument."""

    def __init__(self, width=5, classes=2, scheduler=None, net=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
            self.net = net or nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, classes))
        self.scheduler = scheduler
        self.rates = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return cross_entropy(self(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val_loss", cross_entropy(self(x), y))

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.scheduler is None:
            return sgd
        return {"optimizer": sgd, "lr_scheduler": self.scheduler(sgd)}


class Child(Lit):
    def training_step(self, batch, index):
        x, y = batch
        return cross_entropy(self.net(x), y)


class Parts(Lit):
    """Two children that are trained, put together in forward."""

    def __init__(self):
        super().__init__()
        whole = self.net
        self.net, self.head = whole[:2], whole[2]

    def forward(self, x):
        return self.head(self.net(x))


class Manual(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(x), y))
        optimizer.step()


def trainer(callback, *more, **settings):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(more),
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
    }
    return lightning.Trainer(callbacks=[callback, *more], **(quiet | settings))


def fit(model, callback=None, *, validate=True, **settings):
    callback = callback or PrivacyCallback(**GOAL)
    held_out = DataLoader(data(), batch_size=8) if validate else None
    run = trainer(callback, **settings)
    run.fit(model, loader(), held_out)
    return run, callback


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def expected():
    """The weights that `make_private` makes in a loop of its own."""
    model = Lit().net
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"epochs": EPOCHS, "key": Key.from_seed(403), "seed": 5}
    private = make_private(model, sgd, loader(), **GOAL, **settings)
    for _ in range(EPOCHS):
        for x, y in private.loader:
            private.optimizer.zero_grad()
            cross_entropy(private.model(x), y).backward()
            private.optimizer.step()
    return weights(model)


@pytest.mark.parametrize("kind", [Lit, Child, Parts, Manual])
def test_two_lines_make_the_bits_of_make_private(kind, expected):
    model = kind()
    names = list(model.state_dict())
    callback = PrivacyCallback(**GOAL, key=Key.from_seed(403), seed=5)
    run, _ = fit(model, callback)
    assert torch.equal(weights(model), expected)
    assert callback.optimizer.t == run.global_step == EPOCHS * STEPS
    assert list(model.state_dict()) == names
    spent = callback.optimizer.private.mechanism.epsilon
    assert float(run.callback_metrics["privacy_epsilon"]) == pytest.approx(spent, rel=1e-6)
    assert run.progress_bar_metrics["privacy_epsilon"] == pytest.approx(spent, rel=1e-6)
    run.validate(model, DataLoader(data(), batch_size=8), verbose=False)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_checkpoint_goes_on_bit_by_bit(stop, tmp_path):
    def made(**settings):
        return PrivacyCallback(**GOAL), settings

    callback, _ = made()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    model = Lit(scheduler=lambda o: {"scheduler": StepLR(o, 1, 0.5), "interval": "step"})
    run = trainer(callback, saving)
    run.fit(model, loader())
    whole, spent = weights(model), callback.optimizer.epsilon_spent()
    path = tmp_path / f"step={stop}.ckpt"
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(model.state_dict())
    ledger = callback.optimizer.private.ledger.state_dict()
    del run, callback, saving

    callback, _ = made()
    model = Lit(scheduler=lambda o: {"scheduler": StepLR(o, 1, 0.5), "interval": "step"})
    run = trainer(callback)
    run.fit(model, loader(), ckpt_path=path, weights_only=True)
    assert callback.optimizer.t == EPOCHS * STEPS
    assert torch.equal(weights(model), whole)
    assert callback.optimizer.epsilon_spent() == spent
    again = callback.optimizer.private.ledger.state_dict()
    assert repr(again) == repr(ledger)


def test_another_runs_checkpoint_is_refused(tmp_path):
    plain = lightning.Trainer(accelerator="cpu", logger=False, max_epochs=1, max_steps=1,
                              enable_progress_bar=False, enable_model_summary=False,
                              enable_checkpointing=False)  # fmt: skip
    plain.fit(Lit(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    model = Lit()
    with pytest.raises(RootnoiseError, match=r"^saved version must be 1, got None"):
        trainer(PrivacyCallback(**GOAL)).fit(
            model, loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True
        )


def halving(sgd):
    return {"scheduler": StepLR(sgd, 1, 0.5), "interval": "step"}


def accumulated(parts, *more, model=None, batch_size=8, path=None, **changes):
    """A run whose batch of 8 is made of several parts; each training loss is kept."""
    model = model or Lit(scheduler=halving)
    given = {"key": Key.from_seed(406), "seed": 5} if path is None else {}
    callback = PrivacyCallback(**GOAL | given | changes)
    run = trainer(callback, *more, accumulate_grad_batches=parts)
    batches = DataLoader(data(), batch_size=batch_size // parts, shuffle=True)
    run.fit(model, batches, ckpt_path=path, weights_only=None if path is None else True)
    return run, callback, model


@pytest.mark.parametrize("sampling", ["fixed-cycle", "poisson"])
def test_accumulated_batches_are_the_run_of_whole_ones(sampling):
    """Rates, noise bits and counts as well; Lightning's division of the loss clips no less."""
    more = {"sampling": sampling} | ({"mechanism": "identity"} if sampling == "poisson" else {})
    ends = []
    for parts in (1, 2, 4):
        run, callback, model = accumulated(parts, clip_norm=2.0, **more)
        private = callback.optimizer.private
        assert run.global_step == private.t == EPOCHS * STEPS
        assert len(model.rates) == parts * EPOCHS * STEPS
        assert model.rates[::parts] == pytest.approx([0.1 * 0.5**t for t in range(6)])
        ends.append((weights(model), private.stream.state_dict()["state"]))
        assert private.ledger.t == 6
        del run, callback, private, model
        gc.collect()
    for end in ends[1:]:
        torch.testing.assert_close(end[0], ends[0][0], rtol=1e-5, atol=1e-6)
        assert torch.equal(end[1], ends[0][1])


def test_accumulated_batches_go_on_after_a_checkpoint(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    run, callback, model = accumulated(2, saving)
    whole = weights(model)
    del run, callback, saving
    gc.collect()
    _, callback, model = accumulated(2, path=tmp_path / "step=4.ckpt")
    assert torch.equal(weights(model), whole)
    assert callback.optimizer.t == 6


class Stops(Lit):
    def training_step(self, batch, index):
        if index == 3:  # the second part of a batch
            raise KeyboardInterrupt
        return super().training_step(batch, index)


def test_a_batch_broken_off_changes_no_weight():
    model, seen = Stops(), []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(weights(module))

    callback = PrivacyCallback(**GOAL)
    run = trainer(callback, Spy(), accumulate_grad_batches=2)
    with pytest.raises(SystemExit):
        run.fit(model, loader())
    assert callback.optimizer.t == 1
    assert len(seen) == 3  # two parts of one batch, one of the next
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(weights(model), seen[2])
    with pytest.raises(
        RootnoiseError, match=r"^state must be that between two steps, got step 1 i"
    ):
        run.save_checkpoint("never.ckpt")


def test_another_number_of_parts_is_refused():
    callback = PrivacyCallback(**GOAL)
    run = trainer(callback, GradientAccumulationScheduler({0: 2}))
    with pytest.raises(
        RootnoiseError, match=r"^accumulate_grad_batches must stay 1, got 2: batches"
    ):
        run.fit(Lit(), loader())
    assert callback.optimizer.t == 0
    with pytest.raises(
        RootnoiseError, match=r"^options must leave to the trainer .* micro_batch_si"
    ):
        PrivacyCallback(**GOAL, micro_batch_size=2)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_noise_is_planned_for_the_scheduler(interval):
    def cosine(sgd):
        return {"scheduler": CosineAnnealingLR(sgd, 6), "interval": interval}

    model = Lit(scheduler=cosine)
    _, callback = fit(model)
    planned = callback.optimizer.private.mechanism.workload.to_dict()["learning_rates"]
    assert model.rates == pytest.approx(planned, rel=1e-12)
    assert len(set(planned)) == (6 if interval == "step" else 2)


def test_steps_may_be_told_in_place_of_epochs():
    _, callback = fit(Lit(), max_steps=4, max_epochs=-1)
    assert callback.optimizer.t == 4
    assert callback.optimizer.private.mechanism.n_steps == 6
    assert callback.optimizer.epsilon_spent() <= callback.optimizer.private.mechanism.epsilon


def test_a_trial_run_is_made():
    _, callback = fit(Lit(), fast_dev_run=True)
    assert callback.optimizer.t == 1


class Logging(Lit):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss


def test_metrics_of_training_are_warned_of_once():
    with pytest.warns(
        UserWarning, match="training_step logs train_loss, computed from raw"
    ) as told:
        fit(Logging())
    assert len([w for w in told if "raw data" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*raw data")
        fit(Lit())


SETTINGS = {
    "clipping": ({"gradient_clip_val": 1.0}, "gradient_clip_val must be None, for each record's"),
    "part of an epoch": ({"limit_train_batches": 2}, "limit_train_batches must be 1.0, for an"),
    "no end": ({"max_epochs": -1}, "max_epochs or max_steps must be given, for the noise is"),
}


@pytest.mark.parametrize("wrong", SETTINGS)
def test_settings_that_cannot_be_private_are_refused(wrong):
    settings, line = SETTINGS[wrong]
    with pytest.raises(RootnoiseError, match=f"^{line}") as refusal:
        fit(Lit(), **settings)
    assert "\n" not in str(refusal.value)


def test_scalers_and_other_processes_are_refused():
    callback = PrivacyCallback(**GOAL)
    run = trainer(callback)
    run.precision_plugin.scaler = object()
    with pytest.raises(RootnoiseError, match=r"^precision must be 32-true or bf16-mixed, without"):
        run.fit(Lit(), loader())
    run = trainer(callback)
    run.strategy.world_size = 2
    with pytest.raises(RootnoiseError, match=r"^devices must be 1, for Lightning would add up raw"):
        callback.setup(run, Lit(), "fit")
    with pytest.raises(RootnoiseError, match=r"^optimizer must be asked for after fit has begun"):
        _ = callback.optimizer


class Two(Lit):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, _, last = self.net
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (first, last)]


class Direct(Lit):
    """Layers called one by one: no forward of a module that holds them all."""

    def training_step(self, batch, index):
        x, y = batch
        return cross_entropy(self.net[2](self.net[1](self.net[0](x))), y)


class Frozen(Lit):
    def __init__(self):
        super().__init__()
        self.stem = nn.BatchNorm1d(5).requires_grad_(False)

    def forward(self, x):
        return self.net(self.stem(x))


def plateau(sgd):
    return {"scheduler": ReduceLROnPlateau(sgd), "monitor": "val_loss"}


def often(sgd):
    return {"scheduler": StepLR(sgd, 1), "frequency": 2}


MODULES: dict[str, tuple[Any, str]] = {
    "two optimizers": (Two, "configure_optimizers must return one optimizer, got 2"),
    "layers by themselves": (Direct, "training_step must call `self.x.`, or the one child that is"),
    "frozen statistics": (Frozen, "layer stem must be in evaluation mode, for its statistics mix"),
    "batch norm": (
        lambda: Lit(net=nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 2))),
        "layer 0 must not mix examples",
    ),
    "a plateau": (lambda: Lit(scheduler=plateau), "optimizer and scheduler must step alone, got"),
    "a frequency": (
        lambda: Lit(scheduler=often),
        "scheduler must be one that steps at every step or epoch, got 1 with frequency 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MODULES)
def test_modules_that_cannot_be_private_are_refused(wrong):
    make, line = MODULES[wrong]
    model = make()
    with pytest.raises(RootnoiseError, match=f"^{line}") as refusal:
        fit(model)
    assert "\n" not in str(refusal.value)


def test_data_and_options():
    with pytest.raises(RootnoiseError, match=r"^training data must be one DataLoader, got list"):
        trainer(PrivacyCallback(**GOAL)).fit(Lit(), [loader(), loader()])
    with pytest.raises(RootnoiseError, match=r"^options must leave to the trainer .*, got epochs"):
        PrivacyCallback(**GOAL, epochs=3)
    model, callback = Lit(), PrivacyCallback(**GOAL)
    fit(model, callback)
    with pytest.raises(RootnoiseError, match=r"^make_private must be called once a model, got one"):
        fit(model, PrivacyCallback(**GOAL))


class Net(nn.Module):
    settings = ()

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(100, 10)

    def forward(self, x):
        return self.layer(x)


class Recorded(Lit):
    def on_train_start(self):
        loop: Any = self.trainer.optimizers[0]
        inner = loop.private.optimizer
        self.recorder = Recorder(self.net, inner, cross_entropy, 0.7, 8)

    def training_step(self, batch, index):
        self.recorder.batch = batch
        return super().training_step(batch, index)


def test_c_times_the_noise_that_reaches_the_optimizer_is_white():
    model = Recorded(net=Net())
    callback = PrivacyCallback(**GOAL, clip_norm=0.7, key=Key.from_seed(404), seed=4)
    trainer(callback, max_epochs=4).fit(model, loader(100))
    made = callback.optimizer.private.mechanism
    assert made.strategy.bands > 1
    assert len(model.recorder.noise) == 12
    assert white(made, model.recorder.noise)
    assert not white(made, model.recorder.noise, scale=1.1)
    assert not white(made, model.recorder.noise, scale=1 / 1.1)


def test_the_example_runs(capsys):
    path = Path(__file__).parents[1] / "examples" / "with_lightning.py"
    runpy.run_path(str(path))["main"](["--tiny"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("test accuracy 0.")
    assert "1e-05)-differential privacy for one record" in last
