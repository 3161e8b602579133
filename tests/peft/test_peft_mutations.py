# SPDX-License-Identifier: Apache-2.0
"""Adapters damaged by the generator of test_adapter_mutations, loaded by PEFT: right or refused, and never wrong."""

import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import move_adapter
from mutations import FAMILIES, Net
from peft import PeftModel
from pefts import quiet
from torch import Tensor, nn

import osora

pytestmark = quiet
EACH = 45
# PEFT reads the JSON before it knows whose it is: not there, no JSON, no method named in it
BEFORE_OSORA = ValueError, KeyError, TypeError, RecursionError


def load(folder: Path, x: Tensor, low: bool) -> Tensor | Exception:
    """The outputs with the adapter, or the refusal, after which the model must be as it was."""
    model = Net().eval()
    try:
        with torch.no_grad():
            return PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=low)(x)
    except (osora.AdapterError, FileNotFoundError, *BEFORE_OSORA) as error:
        assert {type(module) for module in model.modules()} == {Net, nn.Linear, nn.ModuleDict}
        assert not hasattr(model, "peft_config")
        with torch.no_grad():
            assert torch.equal(model(x), Net()(x))
        return error


@pytest.mark.parametrize("save_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize("config", [osora.OsoraConfig(r=4, tol=1e-4), osora.SorsaConfig(r=4, tol=1e-4, alpha=3.0)])
def test_damaged_adapters_load_right_or_are_refused(config, save_basis, tmp_path):
    x = torch.randn(5, 9)
    for seed, name in enumerate(("good", "other")):
        model = osora.attach(Net().eval(), config)
        torch.manual_seed(seed)  # Net has set it
        osora.save_adapter(move_adapter(model, 0.2), tmp_path / name, save_basis=save_basis)
    wish, other = (load(tmp_path / name, x, False) for name in ("good", "other"))
    assert (wish - other).abs().max() > 0.05
    met: Counter[str] = Counter()
    for seed in range(EACH):
        rng, damage, folder = random.Random(seed), FAMILIES[seed % len(FAMILIES)], tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        damage(folder, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # honest ones of osora's and PEFT's may come with a right load
            found = load(folder, x, low=bool(seed % 2))
        if isinstance(found, Tensor):
            # a damaged seed gives another decomposition, as exact as the file says
            close = torch.equal(found, wish) if save_basis else torch.allclose(found, wish, rtol=0, atol=1e-4)
            assert close, f"{damage.__name__}, seed {seed}: loads wrong, off by {(found - wish).abs().max():.1e}"
        met["loaded" if isinstance(found, Tensor) else type(found).__name__] += 1
    assert met["loaded"] > 2 and met["AdapterError"] > EACH / 2, met
