# SPDX-License-Identifier: Apache-2.0
"""Two hundred adapters damaged by a seeded generator: each loads right or is refused, and none loads wrong.

Right means that the model gives, bit for bit, what the undamaged adapter gives.
"""

import random
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import move_adapter
from mutations import FAMILIES, Net, edit
from torch import Tensor, nn

import osora
from osora import AdapterError, OsoraConfig, SorsaConfig

EACH = 50  # mutations of each of the four adapters


# -- the text of the configuration -----------------------------------------------------------------------------------


# -- the tensors -----------------------------------------------------------------------------------------------------


def load(folder: Path, x: Tensor) -> Tensor | Exception:
    """The outputs with the adapter, or the refusal, after which the model must be as it was."""
    model = Net().eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            return osora.load_adapter(model, folder, progress=False)(x)
    except (AdapterError, FileNotFoundError) as error:
        assert {type(module) for module in model.modules()} == {Net, nn.Linear, nn.ModuleDict}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert str(error) and len(str(error)) < 30_000
        return error


FOUND = {
    "an int beyond every float as a residual": lambda c: c["osora"]["modules"][1].update(max_residual=10**400),
    "an int beyond every float as an option": lambda c: c.update(dropout=10**400),
    "a residual that is no number": lambda c: c["osora"]["modules"][0].update(max_residual=float("nan")),
    "another scale": lambda c: c.update(alpha=2.9),
    "no scale": lambda c: c.update(alpha=None),
}


@pytest.mark.parametrize("found", FOUND)
def test_what_longer_runs_of_the_generator_have_found(found, tmp_path):
    model = osora.attach(Net(), SorsaConfig(r=4, alpha=3.0))
    osora.save_adapter(move_adapter(model), tmp_path)
    edit(tmp_path, FOUND[found])
    with pytest.raises(AdapterError):
        osora.load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize("method", ["osora", "sorsa"])
def test_damaged_adapters_load_right_or_are_refused(method, save_basis, tmp_path):
    kind = {"osora": OsoraConfig, "sorsa": SorsaConfig}[method]
    options: dict[str, Any] = {"r": 4, "tol": 1e-4} | ({"alpha": 3.0} if method == "sorsa" else {})
    x = torch.randn(5, 9)
    for seed, name in enumerate(("good", "other")):
        model = osora.attach(Net().eval(), kind(**options))
        torch.manual_seed(seed)
        move_adapter(model, 0.2)
        osora.save_adapter(model, tmp_path / name, save_basis=save_basis)
    wish, base = load(tmp_path / "good", x), Net()(x).detach()
    other = load(tmp_path / "other", x)
    assert isinstance(wish, Tensor) and isinstance(other, Tensor)
    assert (wish - base).abs().max() > 0.05 and (wish - other).abs().max() > 0.05

    met: Counter[str] = Counter()
    for seed in range(EACH):
        rng = random.Random(f"{method} {save_basis} {seed}")
        damage = FAMILIES[seed % len(FAMILIES)]
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an honest one may come with a right load
            try:
                found = load(folder, x)
            except Exception as error:
                raise AssertionError(f"{damage.__name__}, seed {seed}: {type(error).__name__}: {error}") from error
        met["refused" if isinstance(found, Exception) else "loaded"] += 1
        met[damage.__name__] += 1
        if isinstance(found, Tensor):
            # The same decomposition gives the same bits; a damaged tol or seed gives another one, as exact as it says.
            close = torch.equal(found, wish) if save_basis else torch.allclose(found, wish, rtol=0, atol=1e-4)
            assert close, f"{damage.__name__}, seed {seed}: loads wrong, off by {(found - wish).abs().max():.1e}"
        try:
            osora.adapter_info(folder)
        except (AdapterError, FileNotFoundError):
            assert isinstance(found, Exception), f"{damage.__name__}, seed {seed}: loaded, and refused by adapter_info"
        except Exception as error:
            raise AssertionError(f"{damage.__name__}, seed {seed}: adapter_info: {error!r}") from error
    assert met["refused"] > EACH / 2 and met["loaded"] > 2, met
    assert all(met[damage.__name__] for damage in FAMILIES)
