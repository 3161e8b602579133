# SPDX-License-Identifier: Apache-2.0
"""How far training has moved the singular values and vectors of weights (docs/analysis.md).

ΔΣ and ΔD are those of the SORSA paper (arXiv 2409.00055). ΔD pairs vectors by their index; where singular values are
close, a change of any size exchanges or mixes them and ΔD jumps. ΔΘ compares leading subspaces instead, by their
principal angles, and each counts by the gap that sets it apart.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osora.analysis.weights import Source, Weights
from osora.config import names_or_regex
from osora.files.whole import write_json
from osora.model.targets import name_matches
from osora.svd.arguments import check_matrix
from osora.svd.truncated import truncated_svd

TOL = 1e-8  # of the decompositions, in float64: a vector is then right to 1e-8 over the relative gap


@dataclass(frozen=True)
class WeightChange:
    """What has become of one matrix, or the mean over several; see :func:`weight_change`."""

    name: str
    """The module's name."""
    rank: int
    """How many triplets were compared."""
    sigma: float
    """ΔΣ: mean change of a singular value, in the weight's own unit."""
    direction: float
    """ΔD: from 0 to 1; jumps where singular values are close."""
    angle: float
    """ΔΘ: mean sin² of the principal angles of leading subspaces, from 0 to 1; does not jump."""
    relative: float
    """``‖W₁ − W₀‖ / ‖W₀‖``, of the whole matrices, Frobenius; infinite where W₀ is zero and W₁ is not."""


@dataclass(frozen=True)
class _Triplets:
    """The leading triplets of a matrix in float64, and the singular value after them (0 where none is left)."""

    U: Tensor  # [d, r]
    S: Tensor  # [r + 1]
    V: Tensor  # [k, r]

    @property
    def gaps(self) -> Tensor:
        """[r]: what sets the first 1, 2, … r apart from the rest."""
        return (self.S[:-1] - self.S[1:]).clamp_min(0)


def _rank(weight: Tensor, rank: int | None, name: str) -> int:
    most = min(weight.shape)
    if rank is None:
        return most
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive int, or None for all triplets, got {rank!r}")
    return min(rank, most)


def _triplets(weight: Tensor, rank: int, name: str, tol: float, seed: int) -> _Triplets:
    more = min(rank + 1, *weight.shape)
    found = truncated_svd(weight.detach().double(), more, tol=tol, seed=seed, name=name)
    S = found.S if more > rank else torch.cat([found.S, found.S.new_zeros(1)])
    return _Triplets(found.U[:, :rank], S, found.V[:, :rank])


def _compared(name: str, first: _Triplets, second: _Triplets, relative: float) -> WeightChange:
    r = first.U.shape[1]
    overlaps = [first.U.T @ second.U, first.V.T @ second.V]
    sigma = (first.S[:r] - second.S[:r]).abs().mean()
    direction = 1 - sum(overlap.diagonal().abs().mean() for overlap in overlaps) / 2
    # Σ cos² of the principal angles between the first j left (right) vectors of both is ‖U₀[:, :j]ᵀ U₁[:, :j]‖².
    cosines = sum(overlap.square().cumsum(0).cumsum(1).diagonal() for overlap in overlaps) / 2
    gaps = torch.minimum(first.gaps, second.gaps)
    sizes = torch.arange(1, r + 1, dtype=gaps.dtype, device=gaps.device)
    whole = (sizes * gaps).sum()
    angle = ((sizes - cosines) * gaps).sum() / whole if whole > 0 else whole
    turned, moved = (float(torch.as_tensor(x).clamp(0, 1)) for x in (direction, angle))
    return WeightChange(name, r, float(sigma), turned, moved, relative)


def _relative(before: Tensor, after: Tensor) -> float:
    size = torch.linalg.vector_norm(before, dtype=torch.float64)
    moved = torch.linalg.vector_norm(after.double() - before.double())
    return float(moved / size) if size > 0 else (0.0 if moved == 0 else float("inf"))


def _same(name: str, rank: int) -> WeightChange:
    return WeightChange(name, rank, 0.0, 0.0, 0.0, 0.0)


def weight_change(
    before: Tensor, after: Tensor, *, rank: int | None = None, tol: float = TOL, seed: int = 0, name: str = "weight"
) -> WeightChange:
    """How far the singular values and vectors of ``after`` are from those of ``before``.

    With ``σᵢ, uᵢ, vᵢ`` the triplets of both in descending order, and ``r`` of them compared::

        ΔΣ = mean_i |σᵢ¹ − σᵢ⁰|
        ΔD = 1 − ½ mean_i (|⟨uᵢ¹, uᵢ⁰⟩| + |⟨vᵢ¹, vᵢ⁰⟩|)
        ΔΘ = Σ_j g_j Σ sin² θ(U⁰[:, :j], U¹[:, :j]) / Σ_j j g_j         (mean over U and V)

    ``θ(A, B)`` are the principal angles between the columns' spans, ``g_j = min(σ_j⁰ − σ_{j+1}⁰, σ_j¹ − σ_{j+1}¹)``.
    A leading subspace can jump only where its gap closes, in one of the matrices; there it has no weight. So ΔΘ moves
    continuously with both matrices, unless no gap is left. ΔΣ and ΔD are the SORSA paper's (section on SVD analysis).

    Everything is computed in float64. Of weights that are equal, bit for bit, all four numbers are exactly 0.

    Args:
        before: [d, k], any floating-point dtype; or transposed, if both are.
        after: [d, k].
        rank: triplets to compare, clipped to min(d, k); None for all of them, as in the paper.
        tol: of :func:`osora.truncated_svd`. Vectors are right to tol over the relative gap beside them.
        seed: of the decompositions.
        name: for messages, and of the result.

    Returns:
        ΔΣ as ``sigma``, ΔD as ``direction``, ΔΘ as ``angle``, and the relative size of the change.

    Raises:
        ValueError: different shapes, no matrices, NaN or infinite entries, a rank that is no positive number.
        TypeError: a dtype that cannot be decomposed.
    """
    for weight in (before, after):
        check_matrix(weight, name)
    if before.shape != after.shape or before.dim() != 2:
        raise ValueError(f"{name}: two matrices of one shape are compared, got {[*before.shape]} and {[*after.shape]}")
    rank, after = _rank(before, rank, name), after.to(before.device)
    if torch.equal(before, after):
        return _same(name, rank)
    first, second = (_triplets(weight, rank, name, tol, seed) for weight in (before, after))
    return _compared(name, first, second, _relative(before, after))


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes(Sequence[WeightChange]):
    """Of each module, in order; :attr:`mean` is over them."""

    modules: tuple[WeightChange, ...]
    step: int | None = None

    def __getitem__(self, index: Any) -> Any:
        return self.modules[index]

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def mean(self) -> WeightChange:
        """Each number's mean over the modules, as the paper's figures have it; the rank is the largest."""
        fields = ("sigma", "direction", "angle", "relative")
        means = {field: sum(getattr(module, field) for module in self) / len(self) for field in fields}
        return WeightChange(name="mean", rank=max(module.rank for module in self), **means)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that json can write; an infinite ``relative`` is None."""
        step = {} if self.step is None else {"step": self.step}
        return step | {"mean": _plain(self.mean), "modules": [_plain(module) for module in self]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON; the file appears when it is complete."""
        write_json(Path(path), self.to_dict())


def _plain(change: WeightChange) -> dict[str, Any]:
    return asdict(change) | {"relative": change.relative if math.isfinite(change.relative) else None}


def chosen(names: Iterable[str], modules: str | Sequence[str] | None) -> list[str]:
    """The names that ``modules`` means, as in :class:`osora.OsoraConfig`; ValueError if there is none."""
    names = list(names)
    if modules is None:
        return names
    wanted = names_or_regex("modules", modules)
    if found := [name for name in names if name_matches(name, wanted)]:
        return found
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    raise ValueError(f"no matrix matches modules={modules!r}; their names end in: {ends}")


def _pairs(before: Source, after: Source, modules: str | Sequence[str] | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    first, second = Weights(before, adapter=before is not after), Weights(after)
    common = [name for name in first if name in second]
    alone = [*sorted(first.needed - set(second)), *sorted(second.needed - set(first))]
    if not common:
        raise ValueError(
            f"no matrix has the same name in both: {next(iter(first))!r} here, {next(iter(second))!r} there"
            f"{first.note or second.note}"
        )
    names = chosen([*common, *alone], modules)
    if missing := [name for name in names if name in alone]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        there = second if missing[0] in first else first
        raise ValueError(
            f"{len(missing)} of the model's linear layers have no weight of their name on the other side: "
            f"{', '.join(missing[:3])}{more} (it has {next(iter(there))}, say). Give both as models, loaded by their "
            "class's from_pretrained, if a checkpoint has other names; or name the layers that are meant with modules="
            f"{first.note or second.note}"
        )
    for name in names:
        yield name, first[name], second[name]


def weight_changes(
    before: Source,
    after: Source | None = None,
    *,
    rank: int | None = None,
    modules: str | Sequence[str] | None = None,
    tol: float = TOL,
    seed: int = 0,
) -> Changes:
    """:func:`weight_change` of every linear layer that two models have in common, one layer in memory at a time.

    Args:
        before: a model; the folder of a saved one (``model.safetensors``, in shards or not), read layer by layer; or
            tensors by name, as of ``state_dict()``.
        after: the same. Left out, ``before`` must be an adapted model, and its base is compared with what it is now.
            A model's adapter counts, merged or not: ours, or one of PEFT whose layers have ``get_delta_weight``.
        rank: triplets to compare, None for all of them.
        modules: names that module names end in, or a regular expression for whole names; by default all matrices
            that both have (of a folder or a mapping, embeddings are among them), and every linear layer of a model,
            but for a head with the embedding's weight.
        tol: of the decompositions.
        seed: of the decompositions.

    Returns:
        A sequence of :class:`WeightChange`, with ``mean``, ``to_dict()`` and ``save(path)``.

    Raises:
        ValueError: nothing in common, a model's layer that the other side does not have, shapes that differ, no
            ``after`` for what has no adapter, what :func:`weight_change` raises.
        FileNotFoundError: no such folder.
        TypeError: ``before`` or ``after`` is none of these.
    """
    if after is None:
        if not (isinstance(before, nn.Module) and any(hasattr(module, "base_layer") for module in before.modules())):
            raise ValueError("without after, before must be a model with an adapter, whose base it is compared with")
        after = before
    for name, side in (("before", before), ("after", after)):
        if not isinstance(side, nn.Module | Mapping | str | os.PathLike):
            raise TypeError(
                f"{name} must be a model, the folder of a saved one or tensors by name, got a {type(side).__name__}"
            )
    return Changes(
        tuple(
            weight_change(first, second, rank=rank, tol=tol, seed=seed, name=name)
            for name, first, second in _pairs(before, after, modules)
        )
    )


class ChangeRecorder:
    """ΔΣ, ΔD and ΔΘ of a model along its training, against what it was when the recorder was made.

    Call :meth:`record` in a training loop, or give :meth:`callback` to ``transformers.Trainer``. It keeps a copy
    of each layer's starting weight and its starting triplets, ``8 (d + k) r`` bytes: of a large model, name a few.

    Args:
        model: with an adapter or without.
        rank: triplets to compare, None for all of them.
        modules: as for :func:`weight_changes`; a few layers are enough for a curve.
        every: steps from one record to the next, for :meth:`callback`.
        tol: of the decompositions.
        seed: of the decompositions.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int | None = None,
        modules: str | Sequence[str] | None = None,
        every: int = 100,
        tol: float = TOL,
        seed: int = 0,
    ) -> None:
        """Decompose the starting weights."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every!r}")
        self.model, self.every, self.tol, self.seed = model, every, tol, seed
        weights = Weights(model)
        self._start: dict[str, tuple[Tensor, _Triplets]] = {}
        for name in chosen(weights, modules):
            weight = weights[name].clone()
            check_matrix(weight, name)
            self._start[name] = weight, _triplets(weight, _rank(weight, rank, name), name, tol, seed)
        self.records: list[Changes] = []

    def record(self, step: int) -> Changes:
        """Compare the model as it is now, and keep the result under this step in :attr:`records`."""
        weights, modules = Weights(self.model), []
        for name, (before, first) in self._start.items():
            after, rank = weights[name], first.U.shape[1]
            if torch.equal(before, after):
                modules.append(_same(name, rank))
                continue
            second = _triplets(after.to(before.device), rank, name, self.tol, self.seed)
            modules.append(_compared(name, first, second, _relative(before, after.to(before.device))))
        self.records.append(Changes(tuple(modules), step))
        return self.records[-1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all records as JSON: a list of :meth:`Changes.to_dict`. The file appears when it is complete."""
        write_json(Path(path), [record.to_dict() for record in self.records])

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that records each ``every`` steps, and at the end."""
        from transformers import TrainerCallback

        recorder = self

        class Record(TrainerCallback):
            """Records on the process that logs."""

            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero and state.global_step % recorder.every == 0:
                    recorder.record(state.global_step)

            def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                last = recorder.records[-1].step if recorder.records else None
                if state.is_world_process_zero and last != state.global_step:
                    recorder.record(state.global_step)

        return Record()


__all__ = ["ChangeRecorder", "Changes", "WeightChange", "weight_change", "weight_changes"]
