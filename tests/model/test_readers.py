# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that read weights past their layers: adapted, trained and merged as any other."""

import pytest
import torch
from families import FAMILIES
from peft import get_peft_model

import osora
import osora.peft

READERS = ("WavLM", "Mamba", "Mamba2", "FalconMamba", "Jamba", "MobileBert", "Bloom, slow but exact", "Siglip vision")
pytestmark = pytest.mark.filterwarnings("ignore")  # of these models' own


@pytest.mark.parametrize("method", ["Osora", "Sorsa"])
@pytest.mark.parametrize("api", ["native", "peft"])
@pytest.mark.parametrize("family", READERS)
def test_every_tensor_is_trained_moves_the_output_and_is_merged(family, api, method):
    run = FAMILIES[family].run
    base = FAMILIES[family].model()
    if api == "native":
        model = osora.attach(FAMILIES[family].model(), getattr(osora, f"{method}Config")(r=4))
    else:
        model = get_peft_model(FAMILIES[family].model(), getattr(osora.peft, f"{method}Config")(r=4))
    model.eval()
    with torch.no_grad():
        assert torch.equal(run(model), run(base)), "untrained: the base"
    run(model).float().square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None]
    assert trained and not dead
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
        adapted = run(model)
        assert not torch.allclose(adapted, run(base), atol=1e-4)
        osora.merge(model) if api == "native" else model.merge_adapter()
        torch.testing.assert_close(run(model), adapted, rtol=1e-3, atol=2e-5)
        osora.unmerge(model) if api == "native" else model.unmerge_adapter()
        torch.testing.assert_close(run(model), adapted, rtol=0, atol=0)


@pytest.mark.parametrize("api", ["native", "peft"])
def test_rwkv_is_the_same_in_training_and_in_evaluation(api, caplog):
    """It divides two of its weights in place between the two: they are left out, in words."""
    family, config = FAMILIES["Rwkv"], {"target_modules": "all-linear", "r": 4}
    if api == "native":
        model = osora.attach(family.model(), osora.OsoraConfig(**config))
    else:
        model = get_peft_model(family.model(), osora.peft.OsoraConfig(**config))
    left_out = {record.args[0] for record in caplog.records if "is left out" in record.getMessage()}
    assert {name.split("blocks.")[1] for name in left_out} == {
        f"{i}.{part}" for i in range(2) for part in ("attention.output", "feed_forward.value")
    }
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05)
        training, evaluation = (family.run(m) for m in (model.train(), model.eval()))
        base = [family.run(m) for m in (family.model().train(), family.model().eval())]
    assert not torch.allclose(evaluation, base[1], atol=1e-4)
    assert (training - evaluation).abs().max() <= 2 * (base[0] - base[1]).abs().max() + 1e-4
