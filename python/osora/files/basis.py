# SPDX-License-Identifier: Apache-2.0
"""A basis that is kept (docs/basis.md): a folder with each layer's triplets and one index, for any number of adapters.

Nothing here knows how it was made; see :mod:`osora.initialisation`.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from osora.config import AdapterConfig
from osora.files.basis_layer import (
    BasisError,
    LayerEntry,
    decomposition_of,
    entry_and_digest,
    file_name,
    line_of,
    read_layer,
    told,
)
from osora.files.evidence import check_base, check_sharded_base, warn_of_rounding
from osora.files.format import DTYPES
from osora.files.whole import finish, sync, temporary_beside
from osora.layers.known_base import KnownBase
from osora.layers.sharded import is_sharded
from osora.model.state import BasisNote
from osora.model.targets import Target
from osora.reference import accumulate_dtype
from osora.svd.certificate import Decomposition, Unconverged, report_failure

BASIS_FORMAT = 1
INDEX_FILE = "basis.json"
KIND = "osora-basis"
_AGAIN = "run the same osora init again, which keeps the layers that are whole"

Missing = Literal["raise", "compute"]


@dataclass(frozen=True)
class BasisLayer:
    """One line of the index: a layer's entry, and the digest of its file."""

    entry: LayerEntry
    sha256: str


def fingerprint_of(layers: Sequence[BasisLayer]) -> str:
    """SHA-256 of all entries and digests in the index's order."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.entry.text()}\n{layer.sha256}\n".encode())
    return digest.hexdigest()


def write_index(
    folder: Path, layers: Sequence[BasisLayer], base_model: str | None, staging: Path | None = None
) -> None:
    """Write the index, whole or not at all; it is the last file of a basis to come.

    Until then it has another name in ``staging``, a folder of the same file system, or in ``folder`` itself.
    """
    lines = [line_of(each.entry, each.sha256) for each in layers]
    head = {"kind": KIND, "format_version": BASIS_FORMAT, "fingerprint": fingerprint_of(layers)}
    text = json.dumps(head | {"base_model": base_model}, indent=1)[:-2]
    with told(folder / INDEX_FILE), temporary_beside((staging or folder) / INDEX_FILE) as new:
        new.write_text(text + ',\n "layers": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n", encoding="utf-8")
        finish(new)
        os.replace(new, folder / INDEX_FILE)
        sync(folder)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (path.parent / "config.json").is_file():
            raise FileNotFoundError(
                f"no basis here: {path.parent} is a model's checkpoint (it has a config.json); name the basis's folder"
            ) from None
        begun = any(path.parent.glob("*.safetensors")) if path.parent.is_dir() else False
        raise FileNotFoundError(
            f"no basis here: {path} does not exist"
            + (", though layers of one do: osora init has not ended; run the same command again" if begun else "")
        ) from None
    except NotADirectoryError:
        raise FileNotFoundError(f"no basis here: {path.parent} is no folder") from None
    except (ValueError, RecursionError) as error:
        raise BasisError(f"{path} is damaged, no valid JSON ({error}): {_AGAIN}") from error
    if not isinstance(contents, dict) or contents.get("kind") != KIND:
        raise BasisError(f"{path} is no index of a basis")
    if contents.get("format_version") != BASIS_FORMAT or isinstance(contents["format_version"], bool):
        raise BasisError(
            f"{path} has format_version {contents.get('format_version')!r}, this osora reads {BASIS_FORMAT}: use the "
            "version of osora that wrote it, or a newer one"
        )
    return contents


class BasisFolder:
    """A basis in a folder, as :func:`osora.initialise` writes it. Its index is read and checked here.

    Args:
        folder: the basis's.

    Raises:
        FileNotFoundError: no basis there, or one that is not finished.
        BasisError: a damaged index, or one of another format.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_FILE
        contents = _read_index(path)
        found = contents.get("layers")
        if not isinstance(found, list) or not found:
            raise BasisError(f"{path}: layers is missing, or no list of layers")
        self.layers: dict[str, BasisLayer] = {}
        for values in found:
            entry, digest = entry_and_digest(values, str(path))
            if entry.name in self.layers:
                raise BasisError(f"{path}: {entry.name} is listed twice")
            self.layers[entry.name] = BasisLayer(entry, digest)
        self.fingerprint = fingerprint_of(list(self.layers.values()))
        if contents.get("fingerprint") != self.fingerprint:
            raise BasisError(f"{path} is damaged, its fingerprint is not that of its layers: {_AGAIN}")
        self.base_model: str | None = (
            contents.get("base_model") if isinstance(contents.get("base_model"), str) else None
        )

    @property
    def note(self) -> BasisNote:
        """What an adapter's file says of this basis."""
        return BasisNote(self.fingerprint, str(self.folder.resolve()))

    def read(self, name: str) -> Decomposition:
        """A layer's triplets, checked against the index.

        Raises:
            KeyError: no layer of that name.
            FileNotFoundError: its file is gone.
            BasisError: its file is damaged, or another layer's.
        """
        layer = self.layers[name]
        path = self.folder / file_name(name)
        entry, digest, tensors = read_layer(path)
        if entry != layer.entry or digest != layer.sha256:
            raise BasisError(f"{path} is not the file that {INDEX_FILE} tells of for {name}: it is one of {entry.name}")
        return decomposition_of(entry, tensors)

    # -- for a model's layers --

    def names_for(self, targets: Sequence[Target]) -> dict[str, str]:
        """Target's name → layer's name here, of those that are here.

        A model with or without a head, say, has one prefix more or less before all its names; the prefix that finds
        most of the targets is taken, none of the two if it finds as many.
        """

        def found(old: str, new: str) -> dict[str, str]:
            places = {}
            for target in targets:
                for name in target.names:
                    if name.startswith(old) and (place := new + name.removeprefix(old)) in self.layers:
                        places[target.name] = place
                        break
            return places

        best = found("", "")
        if len(best) == len(targets):
            return best
        prefixes = set()
        for name in (targets[0].name, targets[-1].name):
            parts = name.split(".")
            for dropped in range(len(parts)):
                old, rest = "".join(f"{part}." for part in parts[:dropped]), ".".join(parts[dropped:])
                prefixes |= {
                    (old, there.removesuffix(rest))
                    for there in self.layers
                    if there == rest or there.endswith(f".{rest}")
                }
        for old, new in sorted(prefixes):
            places = found(old, new)
            if len(places) > len(best) and len(set(places.values())) == len(places):
                best = places
        return best

    def _check(self, target: Target, entry: LayerEntry, config: AdapterConfig) -> None:
        """Raise BasisError for a layer that cannot serve the target, by what the index says of it."""
        where = f"the basis {self.folder}"
        if (entry.out_features, entry.in_features) != target.weight.shape:
            raise BasisError(
                f"{where} is of another model: its {entry.name} is {[entry.out_features, entry.in_features]}, this "
                f"model's {target.name} is {list(target.weight.shape)}"
            )
        if entry.rank < target.rank:
            raise BasisError(
                f"{where} has rank {entry.rank} for {entry.name}, and {target.rank} is asked for: take a smaller rank, "
                f"or make another basis (osora init --r {target.rank})"
            )
        here, there = target.weight.dtype, DTYPES[entry.dtype]
        if here != there and accumulate_dtype(there) != there:
            raise BasisError(
                f"{where} is in {entry.dtype}, and the weight of {target.name} in {str(here).removeprefix('torch.')}: "
                f"load the model in {entry.dtype}, or make the basis in the model's dtype (osora init --dtype)"
            )
        if there == torch.float32 and here == torch.float64:
            raise BasisError(
                f"{where} is in float32, and the weight of {target.name} in float64: make a basis in float64 "
                "(osora init --dtype float64)"
            )

    def _refusal(self, target: Target) -> Callable[[str, str, str], BasisError]:
        return lambda _, then, now: BasisError(
            f"the weight of {target.name} is not the one that {self.folder} is a basis of ({then} there, {now} here): "
            "make a basis of this model (osora init)"
        )

    def _one(
        self, target: Target, name: str, config: AdapterConfig, known: str | None
    ) -> tuple[Decomposition, str | None]:
        entry = self.layers[name].entry
        same = known == entry.weight_sha256
        difference = None if same else check_base(asdict(entry), target.module, self._refusal(target))
        factors = replace(self.read(name).leading(target.rank), name=target.name)
        if factors.converged and factors.certificate.max_residual > config.tol:
            raise BasisError(
                f"the basis {self.folder} is exact to {factors.certificate.max_residual:.1e} for {name}, and "
                f"tol={config.tol:g} is asked for: allow that, or make it again with a smaller tol (osora init --tol)"
            )
        return factors, difference

    def factors(
        self,
        targets: Sequence[Target],
        names: Mapping[str, str],
        config: AdapterConfig,
        known: Mapping[str, str],
        bases: MutableMapping[str, KnownBase] | None = None,
    ) -> Iterator[tuple[Target, Decomposition]]:
        """Each target with its leading triplets, in order; the base weights are checked to be those of the basis.

        Args:
            targets: layers that are all in ``names``.
            names: of :meth:`names_for`.
            config: whose ``tol`` the triplets must hold.
            known: target's name → digest of its weight, where somebody has looked: no need to look again.
            bases: gets what is known of weights of which each process holds a part; all of them ask for the same then.
                Weights on the meta device are taken on trust. None where neither can be served.

        Raises:
            BasisError: another base, too small a rank, a narrower dtype, a damaged file; naming it.
            FileNotFoundError: a layer's file is gone.
        """
        for target in targets:  # all that costs nothing, before any work
            self._check(target, self.layers[names[target.name]].entry, config)
        known = dict(known)
        for target in targets if bases is not None else ():  # here, for in threads they would not meet in one order
            entry = self.layers[names[target.name]].entry
            if target.weight.device.type == "meta":
                known[target.name] = entry.weight_sha256  # it is looked at when it has values: osora.restore_basis
            elif is_sharded(target.module.weight):  # type: ignore[arg-type]
                base = check_sharded_base(target.name, asdict(entry), target.module, self._refusal(target))
                bases[target.name], known[target.name] = base, base.digest  # type: ignore[index]
        workers = max(1, torch.get_num_threads())  # hashing leaves the interpreter's lock
        waiting: deque[tuple[Target, Future[tuple[Decomposition, str | None]]]] = deque()
        differences = []

        def next_one() -> tuple[Target, Decomposition]:
            target, future = waiting.popleft()
            found, difference = future.result()
            if difference is not None:
                differences.append(difference)
            return target, found

        with ThreadPoolExecutor(workers, thread_name_prefix="osora-basis") as pool:
            try:
                for target in targets:
                    if len(waiting) > 2 * workers:
                        yield next_one()
                    waiting.append(
                        (target, pool.submit(self._one, target, names[target.name], config, known.get(target.name)))
                    )
                while waiting:
                    yield next_one()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        warn_of_rounding(differences, "the basis was made", stacklevel=6)


def check_missing(missing: str) -> None:
    """Raise ValueError for what :func:`from_basis` does not know."""
    if missing not in ("raise", "compute"):
        raise ValueError(f'missing must be "raise" or "compute", got {missing!r}')


Rest = Callable[[list[Target]], Iterator[tuple[Target, Decomposition]]]


def from_basis(
    basis: BasisFolder,
    targets: Sequence[Target],
    *,
    config: AdapterConfig,
    missing: Missing,
    unconverged: Unconverged,
    rest: Rest,
    known: Mapping[str, str] = MappingProxyType({}),
    bases: MutableMapping[str, KnownBase] | None = None,
) -> Iterator[tuple[Target, Decomposition]]:
    """The targets' triplets from a basis, and those of layers that it lacks from ``rest``, if ``missing`` says so.

    Raises:
        ValueError: ``missing`` is unknown.
        BasisError: a layer is missing and ``missing`` is "raise"; what :meth:`BasisFolder.factors` refuses.
    """
    check_missing(missing)
    names = basis.names_for(targets)
    absent = [target for target in targets if target.name not in names]
    if absent and missing == "raise":
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise BasisError(
            f'the basis {basis.folder} has no layer {absent[0].name}{more}: missing="compute" decomposes them here, or '
            "make the basis with these targets (osora init)"
        )
    failed = []
    there = [target for target in targets if target.name in names]
    for target, found in basis.factors(there, names, config, known, bases):
        if not found.converged:
            failed.append(found)
        yield target, found
    report_failure(failed, config.tol, unconverged, 5, "a larger tol")
    if absent:
        yield from rest(absent)


__all__ = [
    "BASIS_FORMAT",
    "INDEX_FILE",
    "BasisFolder",
    "BasisLayer",
    "Missing",
    "Rest",
    "check_missing",
    "fingerprint_of",
    "from_basis",
    "write_index",
]
