# SPDX-License-Identifier: Apache-2.0
"""What a model's checkpoint does not have: a new head, resized embeddings. And target names that no module has."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from torch import nn

import osora
from osora import adapted_layers
from osora.model.fresh import fresh_parts

transformers = pytest.importorskip("transformers")
every_config = pytest.mark.parametrize("config", [osora.OsoraConfig, osora.SorsaConfig], ids=["osora", "sorsa"])

HEADS = {  # family -> its name for a classifier's head
    "llama": (lambda: tiny_llama(tied=False), "score"),
    "gpt2": (tiny_gpt2, "score"),
    "bert": (tiny_bert, "classifier"),
}


@pytest.fixture(params=HEADS)
def classifier(request, tmp_path: Path) -> tuple[Callable[[int], nn.Module], str]:
    """Makes a classifier from a checkpoint that has no head, and the head's name."""
    make, head = HEADS[request.param]
    make().save_pretrained(tmp_path / "base")

    def classify(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=3, pad_token_id=0
        ).eval()

    return classify, head


@every_config
def test_a_fresh_head_is_found_and_left_out(classifier, config, tmp_path):
    """It is in no adapter's file, and adapted it would refuse the file: a line says so, at attach and on loading."""
    make, head = classifier
    with pytest.warns(
        RuntimeWarning, match=rf"does not have ({head}|bert\.pooler\.dense, {head}) as here.*modules_to_save"
    ):
        model = osora.attach(make(1), config(r=4))
    assert head in fresh_parts(model) and head not in adapted_layers(model) and len(adapted_layers(model)) > 7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert osora.count_parameters(make(1), config(r=4)).trainable == osora.summary(model).trainable
    osora.save_adapter(move_adapter(model), tmp_path / "adapter")
    with pytest.warns(RuntimeWarning, match=rf"{head} as here"):
        osora.load_adapter(make(2), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:the checkpoint does not have:RuntimeWarning")
def test_the_cure_holds(classifier, tmp_path):
    """The base saved once with its head: both load from there, with the head's values, and nothing is fresh."""
    make, _ = classifier
    base = make(1)
    base.save_pretrained(tmp_path / "with-head")
    model, ids = move_adapter(osora.attach(base, osora.OsoraConfig(r=4))), token_ids()
    wish = logits(model, ids)
    osora.save_adapter(model, tmp_path / "adapter")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "with-head").eval()
    assert fresh_parts(again) == {}
    assert torch.equal(logits(osora.load_adapter(again, tmp_path / "adapter"), ids), wish)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_under_peft(classifier, method, tmp_path):
    """modules_to_save, by name or by PEFT's task, trains and saves it; without, a line says so and it is left out."""
    peft = pytest.importorskip("peft")
    import osora.peft

    make, head = classifier
    config, ids = getattr(osora.peft, method), token_ids()
    whole = [head] if head == "score" else [head, "pooler"]
    for number, options in enumerate(({"task_type": "SEQ_CLS"}, {"modules_to_save": whole})):
        if number == 0 and head != "score":
            options["modules_to_save"] = ["pooler"]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the checkpoint does not have", RuntimeWarning)
            model = peft.get_peft_model(make(1), config(r=4, **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.05)
        wish = logits(model.eval(), ids)
        model.save_pretrained(tmp_path / str(number))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "the checkpoint does not have", RuntimeWarning)
            other = peft.PeftModel.from_pretrained(make(2), tmp_path / str(number))
        assert torch.equal(logits(other, ids), wish)
    with pytest.warns(RuntimeWarning, match=rf"{head} as here .*train it whole, with modules_to_save="):
        model = peft.get_peft_model(make(1), config(r=4))
    assert not any(name.startswith(head) for name in _adapted(model))
    model.save_pretrained(tmp_path / "without")
    with pytest.warns(RuntimeWarning, match=rf"{head} as here"):
        peft.PeftModel.from_pretrained(make(2), tmp_path / "without")


def _adapted(model: nn.Module) -> list[str]:
    from osora.peft.layer import AdapterLayer

    return [module.name for module in model.modules() if isinstance(module, AdapterLayer)]


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_are_told(tied, tmp_path):
    """Their new rows are others each time: natively nothing of them is saved, and a line says so."""
    tiny_llama(tied=tied).save_pretrained(tmp_path / "base")

    def make(seed: int) -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(120, mean_resizing=False)
        return model.eval()

    found = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    with pytest.warns(RuntimeWarning, match=rf"does not have {', '.join(found)} as here"):
        model = osora.attach(make(1), osora.OsoraConfig(r=4))
    osora.save_adapter(move_adapter(model), tmp_path / "adapter")
    with pytest.warns(RuntimeWarning, match=r"model\.embed_tokens"):
        osora.load_adapter(make(2), tmp_path / "adapter")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_nothing_is_said_of_what_is_known(tmp_path):
    """A model from its whole checkpoint, cast, merged and adapted again; one that no checkpoint made."""
    for make in (tiny_llama, tiny_gpt2, tiny_bert):
        osora.attach(make(), osora.OsoraConfig(r=4))
        make().save_pretrained(tmp_path / "base")
        kind = type(make())
        model = kind.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        assert fresh_parts(model) == {}
        osora.detach(osora.attach(model, osora.OsoraConfig(r=4, tol=1e-2)), merged=True)
        assert len(adapted_layers(osora.attach(model, osora.OsoraConfig(r=4, tol=1e-2)))) > 7
    assert fresh_parts(nn.Sequential(nn.Linear(3, 3))) == {}


def test_a_named_fresh_head_is_adapted(classifier):
    """Whoever names it has asked for it; the line comes all the same."""
    make, head = classifier
    with pytest.warns(RuntimeWarning, match=rf"{head} as here"):
        model = osora.attach(make(1), osora.OsoraConfig(r=2, target_modules=[head]))
    assert list(adapted_layers(model)) == [head]


# -- names that no module has ----------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize(
    ("make", "good"),
    [(tiny_llama, "q_proj"), (tiny_gpt2, "c_attn"), (tiny_bert, "query")],
    ids=["llama", "gpt2", "bert"],
)
def test_a_target_that_no_module_has_is_named(make, good, config):
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=rf"target_modules names 'nothing', 'proj', which no module has; .*{good}"):
        osora.attach(model, config(r=4, target_modules=["proj", good, "nothing"]))
    assert {name: id(module) for name, module in model.named_modules()} == before
    osora.attach(model, config(r=4, target_modules=[good]))
    with pytest.raises(ValueError, match="target_modules names 'nothing', which no module has"):
        osora.add_adapter(model, "second", config(r=2, target_modules=[good, "nothing"]))
    with pytest.raises(ValueError, match="which no module has"):
        osora.count_parameters(make(), config(r=2, target_modules=[good, "nothing"]))


def test_a_name_may_be_longer_and_may_be_left_out_again():
    names = ["layers.0.self_attn.q_proj", "v_proj", "lm_head"]
    config = osora.OsoraConfig(r=4, target_modules=names, exclude_modules=["lm_head"], layers_to_transform=[0])
    assert len(adapted_layers(osora.attach(tiny_llama(tied=False), config))) == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["OsoraConfig", "SorsaConfig"])
def test_peft_adapts_the_others_and_warns(method):
    peft = pytest.importorskip("peft")
    import osora.peft

    config = getattr(osora.peft, method)
    with pytest.warns(RuntimeWarning, match=re.escape("target_modules names 'nothing', which no module has")):
        model = peft.get_peft_model(tiny_llama(), config(r=4, target_modules=["q_proj", "nothing"]))
    assert len(_adapted(model)) == 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "target_modules names", RuntimeWarning)
        model.add_adapter("second", config(r=2, target_modules=["layers.0.self_attn.q_proj", "v_proj"]))
