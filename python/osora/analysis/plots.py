# SPDX-License-Identifier: Apache-2.0
"""Pictures of spectra and of what training does to them (docs/analysis.md). matplotlib is loaded when one is drawn."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from osora.analysis.changes import Changes, chosen
from osora.analysis.weights import Source, Weights
from osora.files.whole import finish, temporary_beside
from osora.svd.truncated import truncated_svd

_STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12}
_COLOURS = ("#1f6f8b", "#c8553d", "#7a9e3b", "#8a5a9e", "#b8860b", "#444444", "#2a9d8f", "#d17a9e")
_SHADES = [(0.05, 0.22, 0.36), (0.93, 0.62, 0.36)]  # the first layer's, a dark blue; the last's, a light orange
_NUMBERS = (
    ("sigma", "ΔΣ, mean change of a singular value"),
    ("direction", "ΔD, vectors paired by index"),
    ("angle", "ΔΘ, leading subspaces"),
)


def _pyplot() -> Any:
    try:
        from matplotlib import cm, colors, figure, rc_context
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("osora's pictures need matplotlib: pip install 'osora[plots]'") from error
    return cm, colors, figure, rc_context


def _write(figure: Any, path: Path) -> None:
    """Whole or not at all; the format is that of the path's ending."""
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"a picture cannot be written as {path.name!r}: take .png, .svg or .pdf")
    with temporary_beside(path) as new:
        figure.savefig(new, format=kind, dpi=150)
        finish(new)
        os.replace(new, path)


def plot_changes(
    path: str | os.PathLike[str], runs: dict[str, Sequence[Changes]], *, title: str = "", log: bool = True
) -> None:
    """ΔΣ, ΔD and ΔΘ over the steps of one or several runs, means over their modules, as one picture.

    Args:
        path: of the picture, ending in .png, .svg or .pdf.
        runs: what to call a run → its records, as :attr:`osora.ChangeRecorder.records` has them.
        title: above the picture.
        log: logarithmic axes for the numbers; zeros are left out then.

    Raises:
        ValueError: no runs, a run without records or with records that have no step, an unknown format.
        ModuleNotFoundError: without matplotlib.
    """
    for name, records in runs.items():
        if not records or any(record.step is None for record in records):
            raise ValueError(f"run {name!r} needs records with steps, as osora.ChangeRecorder makes them")
    if not runs:
        raise ValueError("there are no runs to draw")
    _, _, figures, rc_context = _pyplot()
    with rc_context(_STYLE):
        figure = figures.Figure(figsize=(12, 4), layout="constrained")
        for axes, (field, what) in zip(figure.subplots(1, 3), _NUMBERS, strict=True):
            for place, (name, records) in enumerate(runs.items()):
                points = [(record.step, getattr(record.mean, field)) for record in records]
                points = [point for point in points if point[1] > 0 or not log]
                if points:
                    style = {"color": _COLOURS[place % len(_COLOURS)], "label": name, "linewidth": 2}
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
            axes.set(title=what, xlabel="step", yscale="log" if log and axes.lines else "linear")
            axes.grid(alpha=0.25)
        if len(runs) > 1:
            axes.legend(frameon=False)
        if title:
            figure.suptitle(title)
        _write(figure, Path(path))


def plot_spectra(
    path: str | os.PathLike[str],
    source: Source,
    *,
    rank: int | None = None,
    modules: str | Sequence[str] | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    title: str = "",
) -> dict[str, list[float]]:
    """The singular values of all layers of a model as one picture: a panel for each kind of layer, a line for each.

    A kind is the last part of a module's name. Values are over the layer's largest; the colour tells the layer's place
    among those of its kind, by the scale beside the panels.

    Args:
        path: of the picture, ending in .png, .svg or .pdf.
        source: a model, with its adapter if it has one; the folder of a saved model; or tensors by name.
        rank: singular values of each layer, None for all of them.
        modules: names that module names end in, or a regular expression; by default all matrices there are.
        tol: of :func:`osora.truncated_svd`; a singular value is right to about tol².
        seed: of the decompositions.
        title: above the picture.

    Returns:
        Module name → the singular values that are drawn, descending, as json can write them.

    Raises:
        ValueError: nothing to draw, NaN in a weight, a rank that is no positive number, an unknown format.
        ModuleNotFoundError: without matplotlib.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive int, or None for all singular values, got {rank!r}")
    cm, colors, figures, rc_context = _pyplot()
    weights = Weights(source)
    spectra: dict[str, torch.Tensor] = {}
    for name in chosen(weights, modules):
        weight = weights[name]
        most = min(weight.shape) if rank is None else min(rank, *weight.shape)
        spectra[name] = truncated_svd(weight, most, tol=tol, seed=seed, name=name).S.cpu()
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, S in _in_place(spectra):
        kinds.setdefault(name.rpartition(".")[2], []).append(S / S[0] if S[0] > 0 else S)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    with rc_context(_STYLE):
        figure = figures.Figure(figsize=(3.4 * columns + 0.6, 2.9 * rows + 0.6), layout="constrained")
        panels = [*figure.subplots(rows, columns, sharey=True, squeeze=False).flat]
        lowest = min((float(S[S > 0].min()) for each in kinds.values() for S in each if (S > 0).any()), default=1e-3)
        shades = colors.LinearSegmentedColormap.from_list("layers", _SHADES)
        for axes, (kind, lines) in zip(panels, kinds.items(), strict=False):
            for place, S in enumerate(lines):
                shade = shades(place / max(1, len(lines) - 1))
                axes.semilogy(range(1, len(S) + 1), S.double().clamp_min(1e-300), color=shade, linewidth=1)
            axes.set_title(f"{kind}  ({len(lines)})" if len(lines) > 1 else kind)
            axes.set_ylim(max(lowest / 1.3, 1e-5), 1.3)
            axes.grid(alpha=0.25)
        for axes in panels[len(kinds) :]:
            axes.set_visible(False)
        if max(map(len, kinds.values())) > 1:
            scale = figure.colorbar(cm.ScalarMappable(cmap=shades), ax=panels, ticks=[0, 1], aspect=40)
            scale.set_ticklabels(["first", "last"])
            scale.set_label("layer, in the order of the model")
        figure.supxlabel("index i")
        figure.supylabel("σᵢ / σ₁")
        if title:
            figure.suptitle(title)
        _write(figure, Path(path))
    return {name: S.tolist() for name, S in spectra.items()}


def _in_place(spectra: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Kinds as they come, layers by the numbers in their names: a file may have layer 10 before layer 2."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in spectra))

    def place(name: str) -> tuple[int, list[int]]:
        return kinds.index(name.rpartition(".")[2]), [int(number) for number in re.findall(r"\d+", name)]

    return sorted(spectra.items(), key=lambda item: place(item[0]))


__all__ = ["plot_changes", "plot_spectra"]
