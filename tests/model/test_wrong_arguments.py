# SPDX-License-Identifier: Apache-2.0
"""What is no model, and base layers that were taken away or exchanged: words, natively and with PEFT."""

import copy

import peft
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import osora
import osora.peft

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT's, of a model without a name


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))


def native() -> nn.Module:
    return osora.attach(plain(), osora.OsoraConfig(r=3))


def in_peft(name: str = "default") -> nn.Module:
    config = osora.peft.OsoraConfig(r=3, target_modules="all-linear", init_weights=False)
    return peft.get_peft_model(plain(), config, adapter_name=name)


@pytest.mark.parametrize("given", [None, [plain()], {"a": 1}, 3], ids=["None", "list", "dict", "int"])
def test_what_is_no_model(given, tmp_path):
    osora.save_adapter(native(), tmp_path)
    for call in (osora.attach, lambda model: osora.load_adapter(model, tmp_path), osora.detach, osora.share_base):
        with pytest.raises(TypeError, match=rf"model must be a torch\.nn\.Module, got {type(given).__name__}"):
            call(given)
    with pytest.raises(TypeError, match=f"source must be a model or the folder.*got a {type(given).__name__}"):
        osora.export_lora(given, tmp_path / "lora")
    if not isinstance(given, dict):
        with pytest.raises(TypeError, match=f"before must be a model.*got a {type(given).__name__}"):
            osora.weight_changes(given, plain())
    if isinstance(given, list):
        with pytest.raises(TypeError, match=r"after must be a model.*got a list"):
            osora.weight_changes(plain(), given)


def layer_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "base_layer"))


def no_weight(layer: nn.Module) -> None:
    del layer.base_layer.weight


def identity(layer: nn.Module) -> None:
    layer.base_layer = nn.Identity()


def smaller(layer: nn.Module) -> None:
    layer.base_layer = nn.Linear(9, 6).requires_grad_(False)


def meta(layer: nn.Module) -> None:
    layer.to("meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_weight, "Linear, whose weight is no tensor: it was exchanged"),
        (identity, "Identity, whose weight is no tensor: it was exchanged"),
        (smaller, r"the base weight is \[6, 9\], and the adapter is for one of \[7, 9\]"),
        (meta, "is on the meta device and has no values"),
    ],
)
@pytest.mark.parametrize("api", ["native", "peft"])
def test_a_base_layer_that_is_no_more_what_it_was(api, change, words, tmp_path):
    model = native() if api == "native" else in_peft()
    change(layer_of(model))
    calls = {
        "forward": lambda: model(torch.randn(2, 9)),
        "merge": lambda: osora.merge(model) if api == "native" else model.merge_adapter(),
        "save": lambda: osora.save_adapter(model, tmp_path) if api == "native" else model.save_pretrained(tmp_path),
    }
    if api == "native":
        calls["export"] = lambda: osora.export_lora(model, tmp_path)
    if change in (smaller, meta):
        del calls["forward"]  # the operator's own words
    if change is smaller:
        del calls["save"]  # what is read back
    if change is not meta:
        calls.pop("export", None)  # it needs no base
    for call in calls.values():
        with pytest.raises(ValueError, match=words):
            call()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_sharing_a_model_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = native()
        around = nn.parallel.DistributedDataParallel(model)
        other = osora.share_base(around)
        assert type(other) is nn.Sequential and not osora.adapted_layers(other)
        assert other[0].weight.data_ptr() == model[0].base_layer.weight.data_ptr()
        assert torch.equal(other(torch.ones(2, 9)), plain()(torch.ones(2, 9)))
    finally:
        torch.distributed.destroy_process_group()


def test_peft_names():
    for name in ("a.b", ""):
        with pytest.raises(ValueError, match="an adapter's name must not be empty nor have a dot"):
            in_peft(name)
    model = in_peft()
    with pytest.raises(ValueError, match=r"nor have a dot.*'a\.b'"):
        model.add_adapter("a.b", osora.peft.OsoraConfig(r=2, target_modules="all-linear"))
    assert list(model.peft_config) == ["default"]


def test_peft_names_with_a_slash_are_folders(tmp_path):
    model = in_peft("some/one")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(plain(), tmp_path / "some" / "one")
    x = torch.randn(2, 9)
    assert torch.equal(again(x), model.eval()(x))


def test_peft_state_dicts_of_other_kinds(tmp_path):
    model = in_peft()
    state = model.state_dict()
    with pytest.raises(TypeError, match="state_dict must be a dict of tensors by name, got a list"):
        model.save_pretrained(tmp_path / "a", state_dict=list(state.items()))
    key = next(key for key in state if "osora_U" in key)
    with pytest.raises(ValueError, match=r"osora_U\.default of state_dict is sparse.*to_dense"):
        model.save_pretrained(tmp_path / "a", state_dict={**state, key: state[key].to_sparse()})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_peft_on_a_full_disk(tmp_path, monkeypatch):
    model = in_peft()
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", full)
    with pytest.raises(OSError, match=r"cannot be written, and what was there is left: .*No space left"):
        copy.deepcopy(model).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
