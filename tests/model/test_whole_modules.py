# SPDX-License-Identifier: Apache-2.0
"""``modules_to_save``: modules that an adapter trains whole, its own copy of each, in the model and on disk."""

import ast
import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import logits, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import Tensor, nn
from torch.nn.utils import prune

import osora
from osora import OsoraConfig, SorsaConfig

transformers = pytest.importorskip("transformers")
every_config = pytest.mark.parametrize("config", [OsoraConfig, SorsaConfig], ids=["osora", "sorsa"])
HEADS = {  # family -> what a classifier's checkpoint of it lacks
    "llama": (lambda: tiny_llama(tied=False), ["score"]),
    "gpt2": (tiny_gpt2, ["score"]),
    "bert": (tiny_bert, ["classifier", "pooler"]),
}


@pytest.fixture(params=HEADS)
def classifier(request, tmp_path: Path) -> tuple[Callable[[int], nn.Module], list[str]]:
    """Makes a classifier from a checkpoint that has no head, and the names of what is fresh."""
    make, fresh = HEADS[request.param]
    make().save_pretrained(tmp_path / "base")

    def classify(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=3, pad_token_id=0
        ).eval()

    return classify, fresh


class Net(nn.Module):
    """A body, a head of two layers with running averages, a second head; and a tie if it is asked for."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 7)
        self.head = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.pre_head = nn.Linear(7, 6)
        self.out = nn.Linear(6, 11, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embed(ids)).tanh()
        return torch.cat([self.head(hidden), self.out(self.pre_head(hidden)) * self.out.weight.mean()], -1)


IDS = torch.tensor([3, 1, 10, 0, 7])


def trained(model: nn.Module, *inputs: Tensor, steps: int = 3) -> nn.Module:
    """Some steps in training mode, and back to evaluation."""
    optimiser = torch.optim.SGD(osora.adapter_parameters(model), 0.05)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        found = model(*(inputs or (IDS,)))
        getattr(found, "logits", found).square().mean().backward()
        optimiser.step()
    return model.eval()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@every_config
def test_a_fresh_head_is_trained_saved_and_loaded(classifier, config, tmp_path):
    make, fresh = classifier
    ids = token_ids()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint does not have", RuntimeWarning)
        model = osora.attach(make(1), config(r=4, modules_to_save=fresh))
    before = logits(model, ids)
    assert torch.equal(before, logits(make(1), ids))
    trained(model, ids)
    wish = logits(model, ids)
    assert not torch.equal(wish, before)
    osora.save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the checkpoint does not have", RuntimeWarning)
        other = osora.load_adapter(make(2), tmp_path / "adapter")
    assert torch.equal(logits(other, ids), wish)
    with osora.disabled(model):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(osora.detach(model), ids), before)


def test_the_warning_names_the_cure(classifier):
    make, _ = classifier
    with pytest.warns(RuntimeWarning, match=r"modules_to_save=") as told:
        osora.attach(make(1), OsoraConfig(r=2))
    cure = re.search(r"modules_to_save=(\[.*?\])", str(told[0].message))
    names = ast.literal_eval(cure[1])
    model = osora.attach(make(2), OsoraConfig(r=2, modules_to_save=names))
    assert [whole.name for whole in osora.summary(model).whole] == names


def test_what_is_trained_and_counted():
    config = OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])
    planned = osora.count_parameters(Net(), config)
    model = osora.attach(Net(), config)
    head = 7 * 6 + 6 + 6 + 6 + 6 * 4 + 4
    found = osora.summary(model)
    assert (
        [(whole.name, whole.trainable) for whole in found.whole]
        == [("head", head)]
        == [(whole.name, whole.trainable) for whole in planned.whole]
    )
    assert found.trainable == planned.trainable == head + 7 + 2
    assert found.total == sum(p.numel() for p in Net().parameters()) == planned.total
    assert f"trained whole: head ({head})" in str(found)
    groups = osora.parameter_groups(model, 1e-2, lr_o=1e-3, weight_decay=0.1)
    assert {group["name"]: group["lr"] for group in groups} == {"o": 1e-3, "s": 1e-2, "other": 1e-2}
    inside = {id(p) for group in groups for p in group["params"]}
    assert inside == {id(p) for p in model.parameters() if p.requires_grad}
    assert inside == {id(p) for p in osora.adapter_parameters(model)}


def test_the_module_itself_is_untouched():
    """Weights and running averages: the copy's move, the module's stay, and it is given back as the same object."""
    net = Net()
    head, before = net.head, values(net)
    grads = {name: p.requires_grad_(name != "head.0.bias").requires_grad for name, p in net.named_parameters()}
    model = trained(osora.attach(net, OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])))
    copy_ = model.head.copy_of("default")
    assert same(values(head), {k.removeprefix("head."): v for k, v in before.items() if k.startswith("head.")})
    assert not torch.equal(copy_[1].running_mean, head[1].running_mean)
    assert all(p.grad is not None for p in copy_.parameters()) and all(p.grad is None for p in head.parameters())
    osora.detach(model)
    assert model.head is head and same(values(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads


def test_merged_and_back():
    """The copy answers before, during and after; detach(merged=True) leaves it in the module's place."""
    model = trained(osora.attach(Net().eval(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])))
    wish, copy_ = model(IDS), model.head.copy_of("default")
    torch.testing.assert_close(osora.merge(model)(IDS), wish)
    with pytest.raises(ValueError, match="is merged"), osora.disabled(model):
        pass
    assert torch.equal(osora.unmerge(model)(IDS), wish)
    plain = osora.detach(model, merged=True)
    assert plain.head is copy_ and plain.state_dict().keys() == Net().state_dict().keys()
    torch.testing.assert_close(plain(IDS), wish)
    assert all(p.requires_grad for p in plain.parameters())


def test_names_match_whole_parts():
    """ "head" is no end of "pre_head", a dotted name is one of a longer name, and what is inside is a part."""
    for wanted, found in ((["head"], ["head"]), (["head.2", "out"], ["head.2", "out"]), (["head", "2"], ["head"])):
        model = osora.attach(Net(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=wanted))
        assert [whole.name for whole in osora.summary(model).whole] == found


def test_targets_and_whole_modules():
    """ "all-linear" leaves them out, a name in both is refused, a name for what is inside leaves that out."""
    model = osora.attach(Net(), OsoraConfig(r=2, modules_to_save=["head", "pre_head"]))
    assert list(osora.adapted_layers(model)) == ["body", "out"]
    for targets in (["body", "pre_head"], r"body|pre_head"):
        with pytest.raises(ValueError, match="pre_head is named by target_modules and by modules_to_save"):
            osora.attach(Net(), OsoraConfig(r=2, target_modules=targets, modules_to_save=["pre_head"]))
    model = osora.attach(Net(), OsoraConfig(r=2, target_modules=["body", "0"], modules_to_save=["head"]))
    assert list(osora.adapted_layers(model)) == ["body"]


def _pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.out, "weight", 0.5)
    net(IDS)
    return net


@pytest.mark.parametrize(
    ("make", "wanted", "message"),
    [
        (Net, ["nothing", "head"], "modules_to_save names 'nothing', which no module has"),
        (Net, ["ead"], "modules_to_save names 'ead', which no module has"),
        (lambda: Net(tied=True), ["out"], "out, whose weight is tied to that of embed"),
        (lambda: Net(tied=True), ["embed"], "embed, whose weight is tied to that of out"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()), ["1"], "1, a Tanh, which has no parameters"),
        (_pruned, ["out"], "out: its weights are computed anew"),
    ],
)
def test_what_cannot_be_trained_whole(make, wanted, message):
    model = make()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        osora.attach(model, OsoraConfig(r=2, target_modules=r"body|0", modules_to_save=wanted))
    assert [id(module) for module in model.modules()] == before


def test_wrong_kinds():
    model = tiny_llama()
    with pytest.raises(TypeError, match=r"model\.layers, a ModuleList, which has no forward"):
        osora.attach(model, OsoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["layers"]))
    with pytest.raises(TypeError, match=r"got the str 'head': did you mean \['head'\]"):
        OsoraConfig(modules_to_save="head")
    with pytest.raises(TypeError, match="modules_to_save must be"):
        OsoraConfig(modules_to_save=[""])
    assert OsoraConfig(modules_to_save=[]).modules_to_save is None


def test_a_quantised_module_is_refused():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    net = Net()
    net.out = bitsandbytes.nn.Linear8bitLt(6, 11, bias=False, has_fp16_weights=False)
    with pytest.raises(TypeError, match="out is quantised"):
        osora.attach(net, OsoraConfig(r=2, target_modules=["body"], modules_to_save=["out"]))


def test_several_adapters():
    """Each has its own copy, the active one's answers; a row of a batch has its own, too."""
    model = osora.attach(Net().eval(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "embed"]))
    base = Net().eval()(IDS)
    osora.add_adapter(model, "plain", OsoraConfig(r=2, target_modules=["body"]))
    osora.add_adapter(model, "other", OsoraConfig(r=1, target_modules=["body"], modules_to_save=["head", "out"]))
    osora.add_adapter(model, "alike")
    outputs = {}
    for name in ("default", "plain", "other", "alike"):
        osora.set_adapter(model, name)
        whole = [each.name for each in osora.summary(model).whole]
        wish = {"plain": [], "other": ["head", "out"]}.get(name, ["embed", "head"])
        assert whole == wish and torch.equal(model(IDS), base)
        assert {id(p) for p in model.parameters() if p.requires_grad} == {
            id(p) for p in osora.adapter_parameters(model)
        }
        outputs[name] = trained(model, steps=2 + len(outputs))(IDS).detach()
    assert len({tuple(each.flatten().tolist()) for each in outputs.values()}) == 4
    for name, wish in outputs.items():
        assert torch.equal(osora.set_adapter(model, name)(IDS), wish)
    names = ["other", None, "default", "plain", "other"]
    with osora.disabled(model):
        base = model(IDS)  # whose running averages the training of "plain" has moved, as it would without adapters
    wish = torch.stack([base[i] if name is None else outputs[name][i] for i, name in enumerate(names)])
    with torch.no_grad(), osora.adapters_in_batch(model, names):
        # `out` is read as a weight too, of which there is one for the whole batch: left to the head's columns
        torch.testing.assert_close(model(IDS)[:, :4], wish[:, :4])
    osora.set_adapter(model, "plain")
    for name in ("default", "other", "alike"):
        osora.remove_adapter(model, name)
    assert type(model.head) is nn.Sequential and type(model.out) is nn.Linear
    assert torch.equal(model(IDS), outputs["plain"])


def test_a_batch_of_what_cannot_be_parted():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.pair = nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.body(x), x)

    model = osora.attach(Two().eval(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=["pair"]))
    with torch.no_grad(), osora.adapters_in_batch(model, ["default", "default"]):
        model(torch.ones(2, 4))
    with (
        torch.no_grad(),
        osora.adapters_in_batch(model, ["default", None]),
        pytest.raises(ValueError, match=r"\(Bilinear\) got other arguments than one tensor"),
    ):
        model(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"target_modules": ["body"], "modules_to_save": ["head"]}, {"target_modules": ["2"]}, "within head, which"),
        ({"target_modules": ["body", "0"]}, {"target_modules": ["body"], "modules_to_save": ["head"]}, r"has head\.0"),
        (
            {"target_modules": ["body"], "modules_to_save": ["head.0"]},
            {"target_modules": ["body"], "modules_to_save": ["head"]},
            r"has head\.0",
        ),
        (
            {"target_modules": ["body"], "modules_to_save": ["head"]},
            {"target_modules": ["body"], "modules_to_save": ["head.2"]},
            "has head:",
        ),
    ],
)
def test_adapters_that_overlap(first, second, message, tmp_path):
    model = osora.attach(Net(), OsoraConfig(r=2, **first))
    with pytest.raises(ValueError, match=message):
        osora.add_adapter(model, "second", OsoraConfig(r=2, **second))
    osora.save_adapter(osora.attach(Net(), OsoraConfig(r=2, **second)), tmp_path)
    with pytest.raises(osora.AdapterError, match=message):
        osora.load_adapter(model, tmp_path, name="second")
    assert osora.adapter_names(model) == ["default"]
    model(IDS)


def test_all_linear_beside_a_whole_module():
    model = osora.attach(Net(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    osora.add_adapter(model, "second", OsoraConfig(r=2))
    assert list(osora.adapted_layers(model, "second")) == ["body", "pre_head", "out"]


@every_config
def test_lives_of_a_module(config):
    """Copies, pickles, state dicts, moves, modes and compiled calls."""
    model = trained(osora.attach(Net().eval(), config(r=2, target_modules=["body"], modules_to_save=["head"])))
    wish = model(IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), wish) and twin.head.copy_of("default") is not model.head.copy_of("default")
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), wish)
    fresh = osora.attach(Net().eval(), config(r=2, target_modules=["body"], modules_to_save=["head"]))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), wish)
    storages = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(set(storages)) == len(storages)
    assert model.train().head.copy_of("default")[1].training and not model.eval().head.copy_of("default")[1].training
    shared = osora.share_base(model)
    assert type(shared.head) is nn.Sequential and torch.equal(shared(IDS), Net().eval()(IDS))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), wish)
    model.double()
    assert {tensor.dtype for tensor in model.head.parameters()} == {torch.float64}
    torch.testing.assert_close(model(IDS), wish.double())
    osora.detach(model)
    torch.testing.assert_close(model(IDS).float(), Net().eval()(IDS))


def test_what_is_read_of_a_module_is_the_copys():
    model = trained(osora.attach(Net().eval(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=["out"])))
    assert model.out.weight is model.out.copy_of("default").weight and model.out.out_features == 11
    with osora.disabled(model):
        assert model.out.weight is model.out.base_layer.weight
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.out.nothing


def test_a_head_that_was_replaced_is_told(tmp_path):
    model = osora.attach(
        tiny_llama(tied=False), OsoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    ids = token_ids()
    out = trained(model, ids).generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 3
    model.lm_head = nn.Linear(model.config.hidden_size, 7)
    with pytest.raises(ValueError, match="lm_head, which the adapter 'default' trains whole, was replaced"):
        osora.save_adapter(model, tmp_path)


def test_first_step_tells_of_a_module_without_gradient(caplog):
    model = osora.attach(Net(), OsoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    optimiser = torch.optim.SGD(osora.adapter_parameters(model), 0.1)
    model(IDS)[:, 4:].sum().backward()
    for parameter in model.head.parameters():
        parameter.grad = None
    optimiser.step()
    assert "no gradient has reached the adapter of head before" in caplog.text
