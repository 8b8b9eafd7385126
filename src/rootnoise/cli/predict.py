"""`rootnoise predict`: predictions of a finished model for test data, or for a file."""

from __future__ import annotations

import csv
import io
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from rootnoise._check import RootnoiseError
from rootnoise._files import write_whole
from rootnoise.cli import _number_files, _options, _report

if TYPE_CHECKING:
    from rootnoise.runs.inference import Predictions

FORMATS = (".csv", ".json")


def predict(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a finished run of `train`.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Inputs, one a row, as the model takes them: .npy, .npz, .csv or .json "
            "[default: the test part of the run's data set]."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set's files, if they were moved.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Inputs are pixels, to be scaled as the run's data set is."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="File for label and probabilities of every input: .csv or .json."),
    ] = None,
    json: _options.Json = False,
) -> None:
    """Predict labels with a finished model, and measure its accuracy on the test part.

    On data that were not trained on this costs no privacy. Predictions for the training set are
    computed from the data that epsilon protects, and not for release.
    """
    from rootnoise.runs import data as dataset
    from rootnoise.runs import inference

    if out is not None and out.suffix not in FORMATS:
        raise RootnoiseError(f"out must be .csv or .json, got {out}")
    if data is not None and data_dir is not None:
        raise RootnoiseError(f"data-dir must be left out with --data, got {data_dir}")
    if raw and data is None:
        raise RootnoiseError("raw must be left out without --data, got --raw")
    finished, config = inference.load(run_dir), inference.settings(run_dir)
    labels: Any = None
    if data is None:
        where = data_dir or (Path(config.data_dir) if config.data_dir else None)
        loaded = dataset.load(config.dataset, where)
        inputs, labels = loaded.test_inputs, loaded.test_labels
    else:
        inputs = finished.shaped(_number_files.read(data))
        if raw:
            inputs = dataset.standardised(config.dataset, inputs.numpy())
        dataset.refuse_unscaled(config.dataset, inputs)
    made = finished.predict(inputs)
    if out is not None:
        _write(out, made)
    values = {
        "inputs": len(made.labels),
        "accuracy": None if labels is None else made.accuracy(labels),
        "labels": made.labels.tolist(),
        "out": None if out is None else str(out),
    }
    if not json:  # people see how often each label came
        found, counts = np.unique(made.labels, return_counts=True)
        pairs = zip(found, counts, strict=True)
        values["labels"] = [f"{label}: {count}" for label, count in pairs]
    _report.show(f"predictions of {run_dir}", values, json)


def _write(path: Path, made: Predictions) -> None:
    """Write a line, or an entry, for each input."""
    shares = made.probabilities.round(6).tolist()
    rows = list(zip(made.labels.tolist(), shares, strict=True))
    if path.suffix == ".json":
        content = dumps([{"label": label, "probabilities": each} for label, each in rows])
    else:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(["label", *(f"p{i}" for i in range(len(shares[0])))])
        lines.writerows([label, *each] for label, each in rows)
        content = text.getvalue()
    try:
        write_whole(path, content.encode())
    except OSError as reason:
        raise RootnoiseError(f"out must be writable, got {path}: {reason.strerror}") from None
