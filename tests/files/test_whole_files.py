# SPDX-License-Identifier: Apache-2.0
"""Modules trained whole in an adapter's files, in a merged checkpoint and in an exported LoRA."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import logits, tiny_bert, tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from torch import nn

import osora
from osora import AdapterError, OsoraConfig, SorsaConfig
from osora.files.tensors import read_adapter

transformers = pytest.importorskip("transformers")
every_config = pytest.mark.parametrize("config", [OsoraConfig, SorsaConfig], ids=["osora", "sorsa"])
HEAD = ["classifier", "pooler"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def moved(model: nn.Module, step: float = 0.05) -> nn.Module:
    """Every trained tensor moved at random."""
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in osora.adapter_parameters(model):
            parameter.add_(step * torch.randn_like(parameter))
    return model.eval()


def ids() -> torch.Tensor:
    torch.manual_seed(6)
    return token_ids()


def bert(folder: Path, seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(folder, num_labels=3, pad_token_id=0, **options).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint without a head and without a pooler."""
    tiny_bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter of a classifier on it, and the classifier's logits."""
    model = moved(osora.attach(bert(base, 1), OsoraConfig(r=3, tol=1e-4, modules_to_save=HEAD)))
    osora.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", logits(model, ids())


def test_what_is_in_the_files(saved):
    folder, _ = saved
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    keys = [f"base_model.model.{n}.{k}" for n in ("bert.pooler.dense", "classifier") for k in ("bias", "weight")]
    assert config["modules_to_save"] == HEAD and config["osora"]["others"] == keys
    whole = {each["name"]: each for each in config["osora"]["whole"]}
    assert {name: each["numbers"] for name, each in whole.items()} == {
        "bert.pooler": tensors[keys[0]].numel() + tensors[keys[1]].numel(),
        "classifier": tensors[keys[2]].numel() + tensors[keys[3]].numel(),
    }
    info = osora.adapter_info(folder)
    assert {each.name: each.numbers for each in info.whole} == {n: each["numbers"] for n, each in whole.items()}
    card = (folder / "README.md").read_text()
    assert f"classifier ({whole['classifier']['numbers']:,})" in card and f"{info.trainable:,}" in card


def test_what_is_said_is_what_was_trained(base, saved):
    model = osora.load_adapter(bert(base, 2), saved[0])
    assert osora.summary(model).trainable == osora.adapter_info(saved[0]).trainable


@every_config
@pytest.mark.parametrize("save_basis", [True, False])
def test_restored_and_beside_others(base, config, save_basis, tmp_path):
    """Into the same parameters; under another name beside an adapter of another head."""
    options = config(r=3, tol=1e-4, modules_to_save=HEAD)
    model = osora.attach(bert(base, 1), options)
    start = logits(model, ids())
    osora.save_adapter(model, tmp_path / "start", save_basis=save_basis)
    parameters = [id(p) for p in osora.adapter_parameters(moved(model))]
    wish = logits(model, ids())
    osora.save_adapter(model, tmp_path / "end", save_basis=save_basis)
    osora.restore_adapter(model, tmp_path / "start")
    assert torch.equal(logits(model, ids()), start) and [id(p) for p in osora.adapter_parameters(model)] == parameters
    osora.load_adapter(model, tmp_path / "end", name="end")
    assert torch.equal(logits(model, ids()), start)
    torch.testing.assert_close(logits(osora.set_adapter(model, "end"), ids()), wish, rtol=0, atol=1e-5)
    osora.add_adapter(model, "headless", config(r=2))
    osora.set_adapter(model, "headless")
    with pytest.raises(ValueError, match=r"trains other modules whole than the model's 'headless': bert\.pooler, cla"):
        _restore(model, tmp_path / "end")


def _restore(model: nn.Module, folder: Path) -> None:
    """Into an adapter of the same layers, ranks and method without a head."""
    name = osora.active_adapter(model)
    config = osora.adapter_info(folder).config
    osora.set_adapter(model, "end")
    osora.remove_adapter(model, name)
    osora.add_adapter(model, name, type(config)(r=3, tol=1e-4, exclude_modules=HEAD))
    osora.set_adapter(model, name)
    osora.restore_adapter(model, folder)


def test_another_dtype_of_the_base(base, saved):
    with pytest.warns(RuntimeWarning, match="rounded to another dtype"):
        model = osora.load_adapter(bert(base, 2, dtype=torch.bfloat16), saved[0])
    assert {p.dtype for p in model.classifier.parameters()} == {torch.bfloat16}
    tensors = load_file(saved[0] / TENSORS)
    key = "base_model.model.classifier.weight"
    assert torch.equal(model.classifier.weight, tensors[key].bfloat16())


def changed(folder: Path, change: Callable[[dict, dict], object]) -> None:
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS)


WEIGHT = "base_model.model.classifier.weight"
DAMAGE = {
    "other values": (lambda c, t: t.update({WEIGHT: t[WEIGHT] + 1e-3}), "tensors of classifier are damaged"),
    "exchanged": (
        lambda c, t: t.update({WEIGHT: t[WEIGHT].flip(0).contiguous()}),
        "tensors of classifier are damaged",
    ),
    "NaN": (lambda c, t: t[WEIGHT].fill_(float("nan")), r"classifier\.weight holds NaN or infinite values"),
    "missing": (lambda c, t: t.pop(WEIGHT), r"lacks 1 tensors, the first of which is \S+classifier\.weight"),
    "one more": (
        lambda c, t: [
            t.update({"base_model.model.x.weight": t[WEIGHT] + 0}),
            c["osora"]["others"].append("base_model.model.x.weight"),
        ],
        r"belong to no module of modules_to_save, the first is base_model\.model\.x\.weight",
    ),
    "unnamed": (
        lambda c, t: t.update({"base_model.model.x.weight": t[WEIGHT] + 0}),
        r"does not name, the first is base_model\.model\.x\.weight",
    ),
    "part of a name": (
        lambda c, t: c["osora"]["whole"][1].update(name="classifi"),
        "classifi, trained whole, has no tensor among others",
    ),
    "twice": (lambda c, t: c["osora"]["whole"].append(c["osora"]["whole"][0]), "listed twice"),
    "no list": (lambda c, t: c["osora"].update(whole=3), "whole is no list"),
    "no digest": (lambda c, t: c["osora"]["whole"][0].pop("values_sha256"), "values_sha256 of a module trained whole"),
    "a bad option": (lambda c, t: c.update(modules_to_save="classifier"), "modules_to_save must be a list"),
    "biases too": (lambda c, t: c.update(bias="all"), "was trained with bias='all'"),
    "within a target": (
        lambda c, t: c["osora"]["modules"][0].update(name="classifier"),
        "lacks",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage, base, saved):
    change, message = DAMAGE[damage]
    changed(saved[0], change)
    model = bert(base, 2)
    before = [id(module) for module in model.modules()]
    with pytest.raises(AdapterError, match=message):
        osora.load_adapter(model, saved[0])
    assert [id(module) for module in model.modules()] == before


def test_files_without_entries_are_read_by_their_option(base, saved):
    """As PEFT alone writes them, and as every file of before: the option's names tell."""
    folder, wish = saved
    changed(folder, lambda config, tensors: config["osora"].pop("whole"))
    assert [each.name for each in osora.adapter_info(folder).whole] == ["bert.pooler", "classifier"]
    assert torch.equal(logits(osora.load_adapter(bert(base, 2), folder), ids()), wish)
    changed(folder, lambda config, tensors: config.update(modules_to_save=["classifier"]))
    with pytest.raises(AdapterError, match=r"2 tensors .* first is base_model\.model\.bert\.pooler\.dense\.bias"):
        osora.load_adapter(bert(base, 2), folder)


def test_other_models_are_refused(base, saved):
    torch.manual_seed(0)
    kind = transformers.AutoModelForSequenceClassification
    wide = kind.from_pretrained(base, num_labels=5)
    with pytest.raises(AdapterError, match=r"classifier\.\w+ is \[3.*\], this model's is \[5"):
        osora.load_adapter(wide, saved[0])
    with pytest.raises(
        AdapterError, match=r"classifier, trained whole: bias is in the adapter's file, and not in this model"
    ):
        model = bert(base, 2)
        model.classifier = nn.Linear(model.classifier.in_features, 3, bias=False)
        osora.load_adapter(model, saved[0])
    with pytest.raises(AdapterError, match="trained with classifier whole, which this model does not have"):
        model = bert(base, 2)
        del model.classifier
        osora.load_adapter(model, saved[0])


def test_nan_is_not_saved(base, tmp_path):
    model = osora.attach(
        bert(base, 1), OsoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "pooler"])
    )
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"classifier.*NaN"):
        osora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
def test_a_new_head_is_written_into_the_merged_checkpoint(shard, saved, base, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "sharded", max_shard_size=shard)
    before = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2 or shard == "50GB"
    result = osora.merge_saved(tmp_path / "sharded", saved[0], tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()} == before
    assert [key.rpartition("bert.")[2] for key in result.added] == [
        "pooler.dense.bias",
        "pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    torch.testing.assert_close(logits(bert(tmp_path / "out", 5), ids()), saved[1], rtol=0, atol=1e-5)
    old, new = (osora.files.base_folder.BaseFolder(tmp_path / name) for name in ("sharded", "out"))
    assert new.tensors.keys() - old.tensors.keys() == set(result.added)
    changed = {key for key in old.tensors if not torch.equal(old.tensor(key), new.tensor(key))}
    assert changed == set(result.merged)
    if new.index is not None:
        index = json.loads((tmp_path / "out" / new.index).read_text())
        assert index["weight_map"] == {key: stored.file for key, stored in new.tensors.items()}
        sizes = [stored.end - stored.begin for stored in new.tensors.values()]
        assert index["metadata"]["total_size"] == sum(sizes) and new.index not in result.copied


def test_a_checkpoint_without_the_prefix_of_the_models_names(tmp_path):
    """What is in the body goes under the body's names there, and its pooler is replaced; the head has its own name."""
    torch.manual_seed(1)
    body = transformers.BertModel(tiny_bert().config)
    body.save_pretrained(tmp_path / "body")
    keys = set(load_file(tmp_path / "body" / "model.safetensors"))
    assert not any(key.startswith("bert.") for key in keys) and "pooler.dense.weight" in keys
    model = moved(osora.attach(bert(tmp_path / "body", 1), OsoraConfig(r=3, modules_to_save=HEAD)))
    osora.save_adapter(model, tmp_path / "adapter")
    result = osora.merge_saved(tmp_path / "body", tmp_path / "adapter", tmp_path / "out")
    assert {"pooler.dense.bias", "pooler.dense.weight"} <= set(result.merged)
    assert set(result.added) == {"classifier.bias", "classifier.weight"}
    wish = logits(osora.detach(model, merged=True), ids())
    assert torch.equal(logits(bert(tmp_path / "out", 5), ids()), wish)


@pytest.mark.parametrize("labels", [3, 5])
def test_a_head_of_the_checkpoint_is_replaced(labels, base, tmp_path):
    """Of its shape, in place; of another, in a new file of the same name."""
    torch.manual_seed(2)
    kind = transformers.BertForSequenceClassification
    kind(transformers.AutoConfig.from_pretrained(base, num_labels=labels)).save_pretrained(tmp_path / "headed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = bert(tmp_path / "headed", 4, ignore_mismatched_sizes=True)
    moved(osora.attach(model, OsoraConfig(r=3, modules_to_save=["classifier"])))
    osora.save_adapter(model, tmp_path / "adapter")
    result = osora.merge_saved(tmp_path / "headed", tmp_path / "adapter", tmp_path / "out")
    assert not result.added and {"classifier.weight", "classifier.bias"} <= set(result.merged)
    wish = logits(osora.detach(model, merged=True), ids())
    assert torch.equal(logits(bert(tmp_path / "out", 6), ids()), wish)


def test_a_checkpoint_in_16_bits_takes_the_head_in_16_bits(tmp_path):
    model = tiny_llama(tied=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    moved(osora.attach(wide, OsoraConfig(r=3, modules_to_save=["lm_head"])))
    osora.save_adapter(wide, tmp_path / "adapter")
    osora.merge_saved(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    head = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert head.dtype == torch.bfloat16 and torch.equal(head, wide.lm_head.weight.bfloat16())


# -- exported --------------------------------------------------------------------------------------------------------


def plain(model: nn.Module, folder: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@every_config
@pytest.mark.parametrize("way", ["model", "folder", "folder and base"])
def test_an_exported_lora_has_it(way, config, base, tmp_path):
    model = moved(osora.attach(bert(base, 1), config(r=3, tol=1e-4, modules_to_save=HEAD)))
    wish = logits(model, ids())
    osora.save_adapter(model, tmp_path / "adapter", save_basis=way != "folder and base")
    source = model if way == "model" else tmp_path / "adapter"
    osora.export_lora(source, tmp_path / "lora", base if way == "folder and base" else None)
    written = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert written["modules_to_save"] == ["bert.pooler", "classifier"]
    assert written["task_type"] == ("SEQ_CLS" if way == "model" else None)
    torch.testing.assert_close(logits(plain(bert(base, 7), tmp_path / "lora"), ids()), wish, rtol=0, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.pre_head = nn.Linear(6, 7), nn.Linear(7, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        return self.head(self.pre_head(self.body(x).tanh()).tanh())


def test_what_peft_takes_for_one_by_the_end_of_its_name(tmp_path):
    """PEFT takes "head" for "pre_head" too: of a model both are written; of a folder it may have to be refused."""
    x = torch.randn(5, 6)
    for number, targets in enumerate((["body"], ["body", "pre_head"])):
        model = moved(osora.attach(Net(), OsoraConfig(r=2, target_modules=targets, modules_to_save=["head"])), 0.3)
        osora.export_lora(model, tmp_path / f"lora {number}")
        torch.testing.assert_close(plain(Net(), tmp_path / f"lora {number}")(x), model(x))
        osora.save_adapter(model, tmp_path / f"adapter {number}")
    with pytest.raises(ValueError, match="PEFT would take pre_head, which is adapted, for a module trained whole"):
        osora.export_lora(tmp_path / "adapter 1", tmp_path / "no")
    assert not (tmp_path / "no").exists()


# -- PEFT's files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_between_peft_and_the_native_api(method, base, saved, tmp_path):
    """Each loads what the other wrote, head included; so does a LoRA exported from PEFT's folder."""
    peft = pytest.importorskip("peft")
    import osora.peft

    config = getattr(osora.peft, method)(r=3, tol=1e-4, modules_to_save=HEAD)
    model = peft.get_peft_model(bert(base, 1), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wish = logits(model.eval(), ids())
    model.save_pretrained(tmp_path / "peft")
    block = json.loads((tmp_path / "peft" / CONFIG).read_text())["osora"]
    assert [each["name"] for each in block["whole"]] == ["bert.pooler", "classifier"]
    native = osora.load_adapter(bert(base, 2), tmp_path / "peft")
    assert torch.equal(logits(native, ids()), wish)
    assert sorted(osora.adapter_info(tmp_path / "peft").config.modules_to_save) == HEAD
    osora.save_adapter(native, tmp_path / "native")
    changed(tmp_path / "peft", lambda c, t: t[WEIGHT].add_(1e-3))
    with pytest.raises(AdapterError, match="tensors of classifier are damaged"):
        peft.PeftModel.from_pretrained(bert(base, 3), tmp_path / "peft")
    sound = load_file(tmp_path / "native" / TENSORS)[WEIGHT].clone()
    changed(tmp_path / "peft", lambda c, t: t.update({WEIGHT: sound}))
    back = peft.PeftModel.from_pretrained(bert(base, 3), tmp_path / "native").eval()
    assert torch.equal(logits(back, ids()), wish)
    osora.export_lora(tmp_path / "peft", tmp_path / "lora")
    torch.testing.assert_close(logits(plain(bert(base, 4), tmp_path / "lora"), ids()), wish, rtol=0, atol=1e-5)
    assert read_adapter(tmp_path / "native").whole.keys() == {"bert.pooler", "classifier"}


# -- what training did -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the checkpoint does not have bert.pooler:RuntimeWarning")
def test_changes_of_weights_are_those_of_the_copy(base, tmp_path):
    """Against the base in the same model, and against a folder."""
    model = bert(base, 1)
    model.save_pretrained(tmp_path / "headed")
    moved(osora.attach(model, OsoraConfig(r=3, target_modules=["query"], modules_to_save=["classifier"])))
    for changes in (osora.weight_changes(model), osora.weight_changes(tmp_path / "headed", model)):
        found = {change.name: change.relative for change in changes}
        assert {name for name, moved_by in found.items() if moved_by} == {"classifier", *osora.adapted_layers(model)}
        assert not any("copy@" in name or "base_layer" in name for name in found)


def test_a_module_of_two_names_is_not_exported(tmp_path):
    net = Net()
    net.again = net.head
    model = osora.attach(net, OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    assert model.again is model.head
    with pytest.raises(ValueError, match="head is one module with the names head, again"):
        osora.export_lora(model, tmp_path / "lora")
    assert osora.detach(model).again is model.head
