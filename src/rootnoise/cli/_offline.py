"""`rootnoise factorize --offline`: symmetric workloads, whose noise cannot be streamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rootnoise import _limits
from rootnoise._check import RootnoiseError, integer
from rootnoise.cli._number_files import read
from rootnoise.cli._options import Split, Who
from rootnoise.cli._workload import Options

# A symmetric root takes n^3: 42 s at 2048 steps, and breaking its bands over ten times as long.
MOST_OFFLINE, MOST_ABLATION = 2048, 512


def values(
    work: Options, who: Who, split: Split, others: Mapping[str, Any], *, ablation: bool
) -> dict[str, Any]:
    """Return the errors of A^(1/2) or its bands, and of the requested ablations."""
    from rootnoise.factorization import symmetric

    given = {**vars(work), **vars(who), **vars(split), **others}
    for name, value in given.items():
        if name not in ("workload", "bands") and value is not None and value is not False:
            option = name.replace("_", "-")
            raise RootnoiseError(f"{option} must be left out with --offline, got {value}")
    if work.workload is None:
        raise RootnoiseError("workload must be given with --offline, got none")
    bands = split.given().get("bands")
    if bands == "auto":
        raise RootnoiseError("bands must be an integer with --offline, got auto")
    a = read(work.workload)
    _limits.dense(len(a))
    most, what = (MOST_ABLATION, "ablation") if ablation else (MOST_OFFLINE, "offline")
    integer(f"n_steps of --{what}", len(a), 1, most)
    made = symmetric.offline_factorization(a, bands)
    n = len(a)
    largest = float(a.diagonal().max())  # A_ii = <row i of B, column i of C> <= their norms
    result = {
        "mechanism": "offline-root",
        "n_steps": n,
        "bands": n if bands is None else bands,
        "participation": "one row each, all rows at once",
        "sensitivity": made.sensitivity,
        "sensitivity_exact": True,
        "sensitivity_method": "largest column norm",
        "rmse": made.rmse,
        "max_error": made.max_error,
        "lower_bound": made.lower_bound,
        "lower_bound_method": "trace",
        "gap": made.rmse / made.lower_bound - 1,
        "max_error_lower_bound": largest,
        "max_error_gap": made.max_error / largest - 1,
        "coefficients": None,
        "memory_rows": None,
    }
    if ablation:
        sizes = sorted({p for p in (1, 2, 4, 8, 16) if p < n})
        result["ablation"] = [row._asdict() for row in symmetric.ablation(a, sizes)]
    return result
