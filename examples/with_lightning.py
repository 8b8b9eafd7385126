"""A Lightning script with two lines changed: python examples/with_lightning.py [--tiny]."""

import argparse
import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rootnoise.integrations.lightning import PrivacyCallback  # the first line


class Classifier(lightning.LightningModule):
    """An ordinary module: nothing in it knows of privacy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number for each class."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss. Its value is not logged: epsilon does not cover it."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Log the accuracy on other people's data."""
        x, y = batch
        accuracy = (self(x).argmax(1) == y).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        """Return the optimizer and its scheduler, for both of which the noise is planned."""
        sgd = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def main(words: list[str] | None = None) -> None:
    """Train, and print what may be said about privacy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    n, width, epochs = (64, 4, 1) if parser.parse_args(words).tiny else (4096, 16, 8)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, width, generator=rng)
    y = (x @ torch.randn(width, generator=rng) > 0).long()
    training, test = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])

    privacy = PrivacyCallback(epsilon=2.0, delta=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=[privacy],  # the second line
            default_root_dir=folder,
            logger=False,
        )
        model = Classifier(width)
        trainer.fit(model, DataLoader(training, batch_size=32), DataLoader(test, batch_size=256))
    accuracy = float(trainer.callback_metrics["accuracy"])
    print(f"test accuracy {accuracy:.3f}. {privacy.optimizer.claim()}")


if __name__ == "__main__":
    main()
