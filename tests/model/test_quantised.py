# SPDX-License-Identifier: Apache-2.0
"""Adapters on quantised base weights, and two models on one set of them."""

import copy

import pytest
import torch
from helpers import logits, move_adapter, tiny_llama, token_ids
from precision import unit
from quantise import (
    CONFIGS,
    KINDS,
    assert_untouched,
    dense_twin,
    every_kind,
    every_method,
    loss,
    packs,
    quantised_linear,
    quantised_llama,
    storages,
    unpacked,
)
from torch import Tensor, nn

import osora
from osora import adapted_layers
from osora.layers import OsoraLinear
from osora.layers.base_weight import dense_weight, is_quantised
from osora.model.state import all_layers

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


# -- the layer -------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_method
def test_an_untrained_adapter_changes_no_bit(kind, training, dtype, method):
    model, ids = quantised_llama(kind, dtype).train(training), token_ids()
    want = logits(unpacked(copy.deepcopy(model)), ids)
    osora.attach(model, CONFIGS[method](r=4))
    layers = adapted_layers(model)
    assert len(layers) == 14 and all(is_quantised(layer.base_layer) for layer in layers.values())
    assert torch.equal(logits(model, ids), want)
    # what a basis is kept in: the weights' dtype before they were quantised; 8-bit layers say float16
    basis = torch.float16 if kind == "int8" else dtype
    assert {t.dtype for layer in layers.values() for t in (layer.U, layer.V)} == {basis}
    assert {p.dtype for p in osora.adapter_parameters(model)} == {torch.float32}


@every_kind
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_layer_is_its_base_plus_the_branch(kind, outlier, grad):
    """Also where bitsandbytes' 8-bit product treats columns of x apart, and for x of 2 and of 3 dimensions."""
    base = quantised_linear(nn.Linear(128, 96), kind).eval()
    model = osora.attach(nn.Sequential(base), osora.OsoraConfig(r=8))
    move_adapter(model)
    for shape in ((5, 128), (2, 3, 128)):
        x = torch.randn(shape)
        if outlier:
            x[..., 7] = 50.0
        x.requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            y, plain = model(x), base(x)
        branch = x.double() @ model[0].delta_weight().double().t()
        # a sum in float32 of the base's y and the branch, whose own sums are float32's (with float16 factors for int8)
        torch.testing.assert_close(y.double(), plain.double() + branch, rtol=1e-5, atol=1e-3 if outlier else 1e-4)
        if grad:
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)
            want = torch.autograd.grad(plain, x, dy)[0].double() + dy.double() @ model[0].delta_weight().double()
            torch.testing.assert_close(dx.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_x_in_any_dtype(kind, given, autocast):
    """A model made ready for k-bit training feeds float32 to layers of a bfloat16 model."""
    linear = nn.Linear(64, 64).to(torch.bfloat16)
    model = osora.attach(nn.Sequential(quantised_linear(linear, kind)), osora.OsoraConfig(r=8)).train()
    move_adapter(model)
    x = torch.randn(5, 64, dtype=given).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, base = model(x), model[0].base_layer(x)
        y.float().square().sum().backward()
    assert y.dtype == base.dtype and x.grad.dtype == given
    branch = x.double() @ model[0].delta_weight().double().t()
    close = unit(torch.bfloat16) * 8 if torch.bfloat16 in (y.dtype, model[0].U.dtype) or autocast else 1e-4
    torch.testing.assert_close((y - base).double(), branch, rtol=close, atol=close)
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in osora.adapter_parameters(model))


@every_method
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_is_that_of_the_weights_behind_the_codes(kind, method):
    """Losses, gradients and steps of a plain model that holds the dequantised weights."""
    model = quantised_llama(kind).train()
    twin, ids = dense_twin(model), token_ids(4)
    before = storages(model)
    config = CONFIGS[method](r=4, tol=1e-5)
    osora.attach(model, config), osora.attach(twin, config)
    if kind == "int8":  # whose basis is in float16: take the same for both
        for a, b in zip(adapted_layers(model).values(), adapted_layers(twin).values(), strict=True):
            b.U.copy_(a.U), b.V.copy_(a.V), b.S0.copy_(a.S0)
    optimizers = [torch.optim.SGD(osora.adapter_parameters(m), lr=0.1) for m in (model, twin)]
    for step in range(3):
        losses = [loss(m, ids) for m in (model, twin)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        for value, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
        for a, b in zip(*(osora.adapter_parameters(m) for m in (model, twin)), strict=True):
            # relative to the largest: entries are sums that cancel
            assert (a.grad - b.grad).abs().max() <= 2e-3 * b.grad.abs().max() + 1e-6, step
        for optimizer in optimizers:
            optimizer.step()
    assert losses[0] < loss(copy.deepcopy(model), ids) + 1 and any(
        p.abs().max() > 0 for p in osora.adapter_parameters(model)
    )
    assert_untouched(model, before)


def test_float_storage_is_not_mistaken_for_a_weight():
    """Codes in a tensor that says it is float32 or bfloat16: the same basis as from bytes."""
    torch.manual_seed(3)
    linear, found = nn.Linear(64, 64), []
    for storage in (torch.uint8, torch.float32, torch.bfloat16):
        model = nn.Sequential(quantised_linear(linear, "nf4", quant_storage=storage))
        assert model[0].weight.dtype == storage
        osora.attach(model, osora.OsoraConfig(r=8))
        layer = model[0]
        assert (layer.out_features, layer.in_features, layer.U.dtype) == (64, 64, torch.float32)
        found.append(layer)
    for layer in found[1:]:
        assert torch.equal(layer.U, found[0].U) and torch.equal(layer.S0, found[0].S0)
    want = torch.linalg.svdvals(dense_weight(found[0].base_layer).double())[:8]
    torch.testing.assert_close(found[0].S0.double(), want, rtol=1e-5, atol=0)


@every_kind
def test_dropout_hooks_and_several_adapters(kind):
    model, ids = quantised_llama(kind), token_ids(3)
    osora.attach(model, osora.OsoraConfig(r=4, dropout=0.5), name="one")
    move_adapter(model)
    osora.add_adapter(model, "two")
    for layer in all_layers(model).values():
        for parameter in layer.deltas("two"):
            parameter.data.normal_(std=0.05)
    alone = {"one": logits(model, ids), "two": logits(osora.set_adapter(model, "two"), ids)}
    with osora.disabled(model):
        alone[None] = logits(model, ids)
    with osora.adapters_in_batch(model, ["two", None, "one"]):
        together = logits(model, ids)
    for row, name in enumerate(["two", None, "one"]):
        # another number of rows: bitsandbytes computes packed 4-bit layers in bfloat16
        torch.testing.assert_close(together[row], alone[name][row], rtol=0.05, atol=0.05)
    seen = []
    layer = next(iter(all_layers(model).values()))
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y.clone()) or None)
    torch.testing.assert_close(logits(model, ids), alone["two"], rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    model.train()
    assert not torch.equal(logits(osora.set_adapter(model, "one"), ids), logits(model, ids))  # another mask


@every_kind
def test_the_numbers_of_a_summary_are_those_of_the_weights(kind):
    plain, model = tiny_llama(hidden_size=64, intermediate_size=128), quantised_llama(kind)
    want, got = (osora.summary(osora.attach(m, osora.OsoraConfig(r=4))) for m in (plain, model))
    assert (got.total, got.trainable) == (want.total, want.trainable)


def test_the_materialised_plan_is_refused():
    model = osora.attach(quantised_llama("nf4"), osora.OsoraConfig(r=4))
    with pytest.raises(ValueError, match="not quantised"):
        osora.set_execution(model, "materialised")


# -- merging ---------------------------------------------------------------------------------------------------------


@every_kind
def test_merging_is_refused_and_done_on_request(kind):
    model, ids = quantised_llama(kind), token_ids()
    osora.attach(model, osora.OsoraConfig(r=8))
    move_adapter(model, 0.3)
    want = logits(model, ids)
    weights = {name: layer.base_layer.weight for name, layer in adapted_layers(model).items()}
    before = storages(model)
    for attempt in (osora.merge, lambda m: osora.detach(m, merged=True)):
        with pytest.raises(ValueError, match="requantize=True"):
            attempt(model)
        assert not any(layer.merged for layer in adapted_layers(model).values())
    for _ in range(2):
        osora.merge(model, requantize=True)
        for layer in adapted_layers(model).values():
            wish = dense_weight(layer.base()).double() + layer.delta_weight().double()
            got = dense_weight(layer.base_layer).double()
            # half of the widest gap of each code, of the block's or row's largest entry; and 1 % for nested scales
            worst = {"nf4": 0.152, "fp4": 0.167, "int8": 0.5 / 127}[kind] + 0.012
            assert ((got - wish).abs() <= worst * wish.abs().amax(1, keepdim=True)).all()
        merged = logits(model, ids)
        assert not torch.equal(merged, want)
        osora.unmerge(model)
        assert all(layer.base_layer.weight is weights[name] for name, layer in adapted_layers(model).items())
        assert_untouched(model, before)
        assert torch.equal(logits(model, ids), want)
    osora.merge(model, requantize=True)
    osora.detach(model, merged=True)
    assert torch.equal(logits(unpacked(model), ids), merged) and all(
        is_quantised(m) for n, m in model.named_modules() if "_proj" in n
    )


def test_if_one_layer_cannot_be_merged_none_is():
    model = quantised_llama("nf4")
    osora.attach(model, osora.OsoraConfig(r=4))
    before = storages(model)
    list(adapted_layers(model).values())[-1].o.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"layers\.1.*NaN or infinite"):
        osora.merge(model, requantize=True)
    assert_untouched(model, before)


# -- two models, one set of weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_two_models_share_one_set_of_weights(kind):
    model = tiny_llama(hidden_size=64, intermediate_size=128) if kind is None else quantised_llama(kind)
    ids = token_ids()
    base = logits(copy.deepcopy(model), ids)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    osora.attach(model, osora.OsoraConfig(r=4))
    other = osora.share_base(model)
    assert type(other) is type(model) and not all_layers(other)
    assert {name: p.requires_grad for name, p in other.named_parameters()} == required
    mine = {n.replace("base_layer.", ""): p for n, p in model.named_parameters() if p.data_ptr()}
    own = osora.adapter_parameters(model)
    names = [name for name, p in mine.items() if not any(p is a for a in own)]
    theirs = dict(other.named_parameters())
    assert sorted(names) == sorted(theirs) and other.lm_head.weight is other.model.embed_tokens.weight
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in names)

    osora.attach(other, osora.OsoraConfig(r=6, target_modules=["q_proj", "up_proj"]))
    move_adapter(model), move_adapter(other)
    before = {name: theirs[name].detach().clone() for name in names}
    got = [logits(m, ids) for m in (model, other)]
    for m in (model, other):
        m.train()
        optimizer = torch.optim.AdamW(osora.adapter_parameters(m), lr=1e-2)
        loss(m, ids).backward()
        optimizer.step()
        m.eval()
    assert all(
        not torch.equal(logits(m, ids), y) and not torch.equal(y, base)
        for m, y in zip((model, other), got, strict=True)
    )
    for name, p in other.named_parameters():  # packing by bitsandbytes itself happens once, for both
        name = name.replace("base_layer.", "")
        if name in before and p.shape == before[name].shape:
            assert torch.equal(p, before[name])
    now = {n.replace("base_layer.", ""): p for n, p in other.named_parameters()}
    mine = {n.replace("base_layer.", ""): p for n, p in model.named_parameters()}
    assert all(mine[name].data_ptr() == now[name].data_ptr() for name in names)
    for m in (model, other):
        assert torch.equal(logits(osora.detach(m), ids), base)


def test_a_merged_model_has_no_base_to_share():
    model = osora.merge(osora.attach(tiny_llama(), osora.OsoraConfig(r=4)))
    with pytest.raises(ValueError, match="unmerge"):
        osora.share_base(model)


# -- what is refused -------------------------------------------------------------------------------------------------


def foreign(module: str, name: str, **members) -> type:
    return type(name, (nn.Module,), {"__module__": module, **members})


@pytest.mark.parametrize(
    ("module", "name", "by"),
    [
        ("gptqmodel.nn_modules.qlinear.torch", "TorchLinear", "GPTQ"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", "AWQ"),
        ("hqq.core.quantize", "HQQLinear", "HQQ"),
        ("somebody.kernels", "QuantLinear", "somebody.kernels.QuantLinear"),
        ("transformers.integrations.finegrained_fp8", "FP8Linear", "float8"),
    ],
)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_other_quantised_layers_are_named(module, name, by, targets):
    layer = foreign(module, name)()
    if "fp8" in module:
        layer.weight = nn.Parameter(torch.zeros(64, 64).to(torch.float8_e4m3fn), requires_grad=False)
    else:
        layer.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj = layer
    with pytest.raises(TypeError, match=rf"layers\.1\.self_attn\.q_proj is quantised by .*{by}.*exclude_modules"):
        osora.attach(model, osora.OsoraConfig(r=4, target_modules=targets))
    assert not all_layers(model)
    if targets == "all-linear":
        osora.attach(model, osora.OsoraConfig(r=4, exclude_modules=["layers.1.self_attn.q_proj"]))
        assert len(all_layers(model)) == 13


def test_a_weight_of_torchao_in_a_plain_linear_is_refused():
    """Its tensors say that they are bfloat16."""
    kind = type("AffineQuantizedTensor", (Tensor,), {"__module__": "torchao.dtypes.affine_quantized_tensor"})
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight = nn.Parameter(torch.randn(16, 16).as_subclass(kind), requires_grad=False)
    with pytest.raises(TypeError, match="0 is quantised by torchao"):
        osora.attach(model, osora.OsoraConfig(r=4))


def test_what_is_not_quantised_yet_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(ValueError, match=r"0: it is not quantised yet: .*model\.to"):
        osora.attach(model, osora.OsoraConfig(r=4))


def test_gpt2_by_transformers(tmp_path):
    """Whose Conv1D layers become 4-bit layers with [out, in]."""
    transformers = pytest.importorskip("transformers")
    from helpers import tiny_gpt2

    tiny_gpt2().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    want = logits(unpacked(model), ids := token_ids())
    osora.attach(model, osora.OsoraConfig(r=4))
    layers = adapted_layers(model)
    assert len(layers) == 8 and all(is_quantised(layer.base_layer) for layer in layers.values())
    assert {(layer.out_features, layer.in_features) for layer in layers.values()} == {
        (96, 32),
        (32, 32),
        (128, 32),
        (32, 128),
    }
    assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_goes_on_after_an_evaluation(kind):
    """On a CPU with AVX512-BF16 an evaluation would make bitsandbytes forget the gradient of x, without an error."""
    model, ids = osora.attach(quantised_llama(kind), osora.OsoraConfig(r=4)), token_ids()
    move_adapter(model)
    other = copy.deepcopy(model)
    logits(other.eval(), ids)
    for m in (model.train(), other.train()):
        loss(m, ids).backward()
    for a, b in zip(*(osora.adapter_parameters(m) for m in (model, other)), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.skipif(not packs(), reason="bitsandbytes packs on CPUs with AVX512-BF16 alone")
def test_a_base_that_was_packed_before_is_for_inference():
    model, ids = quantised_llama("nf4"), token_ids()
    want = logits(model, ids)  # packs
    osora.attach(model, osora.OsoraConfig(r=4))
    assert torch.equal(logits(model, ids), want)
    move_adapter(model)
    with pytest.raises(RuntimeError, match=r"packed this 4-bit weight.*load the base model again"):
        loss(model.train(), ids)
    fresh = quantised_llama("nf4")
    osora.detach(osora.attach(fresh, osora.OsoraConfig(r=4)))
    logits(fresh, ids)  # as before it was adapted
    assert fresh.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu


def test_a_copy_is_one():
    model = osora.attach(quantised_llama("nf4"), osora.OsoraConfig(r=4))
    other, ids = copy.deepcopy(model), token_ids()
    want = logits(model, ids)
    move_adapter(other)
    assert torch.equal(logits(model, ids), want) and not torch.equal(logits(other, ids), want)
    assert isinstance(next(iter(all_layers(other).values())), OsoraLinear)


# -- saving and loading ----------------------------------------------------------------------------------------------


def trained(kind: str, method: str = "osora", **options) -> nn.Module:
    return move_adapter(osora.attach(quantised_llama(kind), CONFIGS[method](**({"r": 4, "tol": 1e-5} | options))))


@every_kind
@every_method
@pytest.mark.parametrize("save_basis", [True, False])
def test_saved_and_loaded(kind, method, save_basis, tmp_path):
    model, ids = trained(kind, method), token_ids()
    want = logits(model, ids)
    osora.save_adapter(model, tmp_path, save_basis=save_basis)
    text = (tmp_path / "adapter_config.json").read_text()
    assert f'"quantization":"bnb-{kind}"' in text
    fresh = quantised_llama(kind)
    before = storages(fresh)
    osora.load_adapter(fresh, tmp_path)
    assert_untouched(fresh, before)
    assert torch.equal(logits(fresh, ids), want)
    osora.merge(model, requantize=True)
    osora.save_adapter(model, tmp_path / "again", save_basis=save_basis)  # as if it were not merged
    assert (tmp_path / "again/adapter_config.json").read_text() == text


@pytest.mark.parametrize("nested", [True, False])
def test_packed_and_unpacked_by_bitsandbytes_it_is_the_same_base(nested, tmp_path):
    model = quantised_llama("nf4", compress_statistics=nested)
    osora.save_adapter(move_adapter(osora.attach(model, osora.OsoraConfig(r=4))), tmp_path)
    for unpack in (False, True):
        fresh = quantised_llama("nf4", compress_statistics=nested)
        logits(fresh, token_ids())  # packs, where the CPU has the instructions
        if unpack:
            fresh.state_dict()
        if unpack and packs() and not nested:
            # bitsandbytes 0.50 leaves scales of one level in the packed order: the weights are others now
            with pytest.raises(osora.AdapterError, match="is not the one"):
                osora.load_adapter(fresh, tmp_path)
        else:
            osora.load_adapter(fresh, tmp_path)


@every_kind
def test_another_base_is_refused(kind, tmp_path):
    model = trained(kind)
    osora.save_adapter(model, tmp_path)
    one_code = quantised_llama(kind)
    one_code.model.layers[1].mlp.up_proj.weight.data.view(torch.uint8)[3, 0] += 1
    scaled = quantised_llama(kind)
    if kind == "int8":
        scaled.model.layers[0].mlp.up_proj.weight.SCB *= 1.001
    else:
        state = scaled.model.layers[0].mlp.up_proj.weight.quant_state
        state.state2.absmax *= 2
        state.offset *= 2
    other = quantised_llama("fp4" if kind == "nf4" else "nf4")
    plain = tiny_llama(hidden_size=64, intermediate_size=128)
    for wrong in (one_code, scaled, other, plain):
        with pytest.raises(osora.AdapterError, match="is not the one this adapter was trained on"):
            osora.load_adapter(wrong, tmp_path)
        assert not all_layers(wrong)
    unknown = quantised_llama(kind)
    unknown.model.layers[0].mlp.up_proj = foreign("gptqmodel.layers", "TorchLinear")()
    with pytest.raises(osora.AdapterError, match="quantised by GPTQ"):
        osora.load_adapter(unknown, tmp_path)


@every_kind
def test_an_adapter_goes_with_the_dequantised_base_and_merges_there(kind, tmp_path):
    model, ids = trained(kind), token_ids()
    want = logits(model.train(), ids)
    osora.save_adapter(model, tmp_path)
    twin = dense_twin(osora.detach(model)).train()
    with pytest.warns(RuntimeWarning, match=f"bnb-{kind} then, float32 now"):
        osora.load_adapter(twin, tmp_path)
    torch.testing.assert_close(
        logits(twin, ids), want, rtol=1e-3, atol=1e-3
    )  # another order of sums, and through 2 layers
    torch.testing.assert_close(logits(osora.merge(twin), ids), want, rtol=1e-3, atol=1e-3)


@every_kind
def test_the_analysis_reads_the_weights_behind_the_codes(kind):
    from osora.analysis.weights import of_model

    model = trained(kind)
    for adapter in (False, True):
        found = {name: get() for name, get in of_model(model, adapter).items()}
        for name, layer in adapted_layers(model).items():
            want = dense_weight(layer.base_layer) + (layer.delta_weight() if adapter else 0)
            assert torch.equal(found[name], want)
