# SPDX-License-Identifier: Apache-2.0
"""Which layers an adapter is for, at which rank, and what is refused by name."""

import logging
import re

import pytest
import torch
from attached_models import LLAMA_LINEARS, attached, endings, names
from helpers import tiny_bert, tiny_gpt2, tiny_llama
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.svd.truncated import decompose

# -- which layers ------------------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_but_the_head():
    model = attached(tiny_llama(tied=False))
    assert names(model) == [
        f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for i in (0, 1)
        for name in LLAMA_LINEARS
    ]
    assert endings(attached(tiny_gpt2())) == ["c_attn", "c_fc", "c_proj"]
    assert "cls.predictions.decoder" not in names(attached(tiny_bert()))
    assert "cls.predictions.transform.dense" in names(attached(tiny_bert()))


@pytest.mark.parametrize(
    "targets, found",
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["self_attn.q_proj"], ["q_proj"]),
        (r".*\.(up|down)_proj", ["down_proj", "up_proj"]),
        (r"model\.layers\.1\.mlp\.gate_proj", ["gate_proj"]),
        ({"k_proj"}, ["k_proj"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets(targets, found):
    assert endings(attached(tiny_llama(tied=False), target_modules=targets)) == found


@pytest.mark.parametrize("wrong", [["proj"], ["_proj"], "q_proj", ["layers"], "model"])
def test_a_part_of_a_name_is_no_match(wrong):
    with pytest.raises(ValueError, match=r"no module matches|is a transformers|is a torch"):
        attached(tiny_llama(), target_modules=wrong)


def test_the_message_when_nothing_matches_lists_what_there_is():
    with pytest.raises(ValueError, match=r"no module matches.*'nope'.*down_proj, gate_proj, k_proj, lm_head, o_proj"):
        attached(tiny_llama(), target_modules=["nope"])
    with pytest.raises(ValueError, match="none at all"):
        attached(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_exclude_modules():
    model = attached(tiny_llama(), exclude_modules=["mlp.up_proj", "o_proj"])
    assert endings(model) == ["down_proj", "gate_proj", "k_proj", "q_proj", "v_proj"]
    assert all(".1." in name for name in names(attached(tiny_llama(), exclude_modules=r".*layers\.0\..*")))


@pytest.mark.parametrize("layers", [1, [1], [1, 7]])
def test_layers_to_transform(layers):
    found = names(attached(tiny_llama(layers=3), layers_to_transform=layers))
    assert len(found) == 7 and all(name.startswith("model.layers.1.") for name in found)


def test_rank_pattern_and_clipping(caplog):
    with caplog.at_level(logging.INFO, "osora"):
        model = attached(tiny_llama(layers=1), r=20, rank_pattern={"q_proj": 3, r"mlp\..*": 999})
    ranks = {name.rsplit(".", 1)[-1]: layer.rank for name, layer in adapted_layers(model).items()}
    assert ranks == dict(q_proj=3, k_proj=16, v_proj=16, o_proj=20, gate_proj=32, up_proj=32, down_proj=32)
    notes = {module.name: module.note for module in osora.summary(model).modules if module.note}
    assert notes["model.layers.0.self_attn.k_proj"] == "rank 20 clipped to 16"
    assert notes["model.layers.0.mlp.up_proj"] == "rank 999 clipped to 32" and len(notes) == 5
    assert "k_proj: rank 20 clipped to 16" in str(osora.summary(model))
    assert sum("clipped" in record.message for record in caplog.records) == 5


def test_a_rank_pattern_without_a_match_is_refused():
    with pytest.raises(ValueError, match="rank_pattern 'q_prj' matches no target"):
        attached(tiny_llama(), rank_pattern={"q_prj": 3})


# -- ranks that the weights ask for ------------------------------------------------------------------------------------

DECAYS = {"steep": 2.0, "mild": 1.0, "flat": 0.1}


class Decays(nn.Module):
    """Layers whose singular values fall at different speeds, so that one share of energy needs different ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        for name, decay in DECAYS.items():
            left, right = (torch.linalg.qr(torch.randn(n, 20, dtype=torch.float64))[0] for n in (24, 20))
            layer = nn.Linear(20, 24, dtype=dtype)
            layer.weight.data.copy_(left * torch.arange(1, 21) ** -decay @ right.T)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.steep(x) + self.mild(x) + self.flat(x)


def least_rank(weight: Tensor, fraction: float) -> int:
    squares = torch.linalg.svdvals(weight.detach().double()).square()
    return int((squares.cumsum(0) / squares.sum() < fraction).sum()) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fraction", [0.3, 0.8, 0.95])
def test_rank_for_energy_gives_each_layer_the_rank_it_needs(fraction, dtype):
    model, whole, x = Decays(dtype), attached(Decays(dtype), r=20), torch.randn(3, 20, dtype=dtype)
    wish, y = {name: least_rank(model.get_submodule(name).weight, fraction) for name in DECAYS}, model(x)
    attached(model, r=20, rank_for_energy=fraction)
    assert {name: layer.rank for name, layer in adapted_layers(model).items()} == wish
    assert len(set(wish.values())) > 1 and torch.equal(model(x), y)
    for name, layer in adapted_layers(model).items():  # the leading part of one decomposition, to the last bit
        full = adapted_layers(whole)[name]
        for part in ("U", "V"):
            assert torch.equal(getattr(layer, part), getattr(full, part)[:, : layer.rank])
        assert torch.equal(layer.S0, full.S0[: layer.rank])
        assert layer.S0.untyped_storage().nbytes() == 4 * layer.rank, "the file would hold what was dropped"
        assert layer.s.shape == (layer.rank,)
        residuals = decompose([layer.base_layer.weight], 20, names=[name])[0].residuals
        assert layer.certificate.max_residual == residuals[: layer.rank].max()
        assert full.certificate.max_residual == residuals.max()
    cut, uncut = ([layer.certificate.max_residual for layer in adapted_layers(m).values()] for m in (model, whole))
    assert any(a < b for a, b in zip(cut, uncut, strict=True))
    summary = osora.summary(model)
    assert {module.name: module.rank for module in summary.modules} == wish
    assert not any(module.note for module in summary.modules)
    assert summary.trainable == sum(24 + rank for rank in wish.values())
    assert f" {min(wish.values())}-{max(wish.values())} " in str(summary)


def test_rank_for_energy_where_r_is_too_small(caplog):
    model = Decays()
    with caplog.at_level(logging.INFO, "osora"):
        attached(model, r=6, rank_for_energy=0.9, rank_pattern={"mild": 4})
    notes = {module.name: module.note for module in osora.summary(model).modules}
    ranks = {module.name: module.rank for module in osora.summary(model).modules}
    assert ranks == {"steep": 1, "mild": 4, "flat": 6} and not notes["steep"]
    for name in ("mild", "flat"):
        squares = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double()).square()
        held = float(squares[: ranks[name]].sum() / squares.sum())
        match = re.fullmatch(
            rf"rank {ranks[name]} holds (\S+) of the energy, rank_for_energy=0.9 asks for more", notes[name]
        )
        assert match and 0 <= held - float(match[1]) < 2e-4 and float(match[1]) < 0.9
        assert f"{name}: {notes[name]}" in str(osora.summary(model)) and notes[name] in caplog.text


def test_a_share_that_is_just_missed_is_not_shown_as_reached():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    model[0].weight.data = torch.tensor([3.0, 1.0002, 0.0]).diag()
    (module,) = osora.summary(attached(model, r=1, rank_for_energy=0.9)).modules
    assert "holds 0.8999 of the energy, rank_for_energy=0.9 asks for more" in module.note


def test_rank_for_energy_beside_a_clipped_rank_and_a_zero_weight():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model[1].weight.data.zero_()
    attached(model, r=99, rank_for_energy=1.0)
    modules = {module.name: module for module in osora.summary(model).modules}
    assert modules["0"].rank == 6 and modules["0"].note == "rank 99 clipped to 6"
    assert modules["1"].rank == 1
    assert modules["1"].note == "rank 99 clipped to 4; its weight has rank 0 to rounding, less than 1"
    assert modules["0"].converged and modules["1"].converged


def test_many_notes_do_not_drown_the_table():
    model = attached(tiny_llama(), r=1, rank_for_energy=0.99)
    assert sum(bool(module.note) for module in osora.summary(model).modules) == 14
    table = str(osora.summary(model))
    assert table.count("asks for more") == 8 and table.endswith("and 6 more notes: see modules")


@pytest.mark.parametrize("target", [["embed_tokens"], ["norm"], ["self_attn"]])
def test_other_modules_are_refused_by_name(target):
    with pytest.raises(ValueError, match=r"is a (torch|transformers)\S+; osora adapts torch.nn.Linear and .*Conv1D"):
        attached(tiny_llama(), target_modules=target)


def test_a_tied_head_is_refused():
    with pytest.raises(ValueError, match=r"weight of lm_head is tied .*exclude_modules=\['lm_head'\]"):
        attached(tiny_llama(tied=True), target_modules=["lm_head", "q_proj"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.after = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.attention(x, x, x)[0])


def test_out_proj_of_multihead_attention():
    """Its forward reads the weight and never calls the layer: an adapter there would do nothing."""
    assert names(attached(Attention())) == ["after"]
    with pytest.raises(ValueError, match=r"attention.out_proj is a torch\S+NonDynamicallyQuantizableLinear"):
        attached(Attention(), target_modules=["out_proj"])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
        self.after = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.encoder(x))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_transformer_encoder_never_skips_an_adapter(gradients):
    """In eval mode torch reads the weights of linear1 and linear2 and does not call them, if nothing stops it."""
    model, x = Encoder().eval(), torch.randn(2, 5, 16)
    attached(model)
    assert [name for name in names(model) if "linear" in name] == [
        f"encoder.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)
    ]
    with torch.set_grad_enabled(gradients):
        for name, layer in adapted_layers(model).items():
            before = model(x)
            layer.o.data.normal_()
            assert not torch.allclose(model(x), before, atol=1e-3), f"the adapter of {name} is ignored"


def test_a_subclass_of_linear_is_left_alone():
    class Special(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4))
    assert names(attached(model)) == ["1"]
    with pytest.raises(ValueError, match=r"0 is a .*Special"):
        attached(nn.Sequential(Special(4, 4)), target_modules=["0"])
