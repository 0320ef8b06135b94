"""report.html, made again from the files of a run or a head set."""

from __future__ import annotations

from pathlib import Path

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.methods.scores import load_means
from headtune.analysis.reports import head_report
from headtune.analysis.reports.head_profiles import read_profiles
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.state_files import read_state
from headtune.train.config.recipe import load_recipe
from headtune.train.tracking.media import write_run_page


def rebuild_report(folder: Path) -> Path:
    """Write the report page of a folder again; returns its path.

    Raises:
        InputError: neither a finished run nor a head set.
    """
    path = folder / "evaluation.json"
    evaluation = read_state(path) if path.is_file() else None
    if evaluation is not None and evaluation.get("after") is None:
        evaluation = None  # a run that has not finished has nothing to compare yet
    report = folder / "report.html"
    if (folder / "heads.json").is_file():
        heads = HeadSet.load(folder)
        scores, portraits = folder / "scores.safetensors", folder / "portraits.json"
        means = load_means(scores, heads.shape) if scores.is_file() else {}
        profiles = read_profiles(portraits) if portraits.is_file() else []
        head_report.write_report(report, heads, means, evaluation, profiles=profiles)
    elif not (folder / "recipe.yaml").is_file():
        raise InputError(
            f"{str(folder)!r} is neither a run (recipe.yaml) nor a head set (heads.json); give a folder that headtune "
            "train or headtune identify wrote"
        )
    elif evaluation is None:
        raise InputError(f"run {str(folder)!r} is not finished; finish it with: headtune train RECIPE --resume")
    else:
        write_run_page(load_recipe(str(folder / "recipe.yaml")), folder, evaluation)
    return report
