# SPDX-License-Identifier: Apache-2.0
"""What a script written for PEFT's LoRA may take for granted, asked of osora's methods and of LoRA alike."""

import warnings
from dataclasses import fields

import pytest

peft = pytest.importorskip("peft")

import torch  # noqa: E402
from helpers import tiny_llama, token_ids  # noqa: E402
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402
from pefts import adapted, layers, move, quiet  # noqa: E402
from root import ROOT  # noqa: E402
from torch import nn  # noqa: E402

from osora.peft import OsoraConfig, SorsaConfig  # noqa: E402

transformers = pytest.importorskip("transformers")
pytestmark = quiet

METHODS = [OsoraConfig, SorsaConfig]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def of_task(task: str, family: str = "Bert") -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    return getattr(transformers, f"{family}{TASKS[task]}")(config).eval()


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    found = model(input_ids=torch.arange(3, 9)[None])
    return found.logits if "logits" in found else torch.stack((found.start_logits, found.end_logits))


def state(model: nn.Module) -> tuple:
    """What a refused call must leave as it was."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        hasattr(model, "peft_config"),
    )


# -- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("task", "family"), [*((task, "Bert") for task in TASKS), ("SEQ_CLS", "Roberta")])
def test_a_tasks_head_is_trained_whole_and_no_target(task, family, method, tmp_path):
    model = get_peft_model(of_task(task, family), method(r=4, task_type=task))
    base = model.get_base_model()
    names = {name for name in ("classifier", "score", "qa_outputs") if hasattr(base, name)}
    assert not any(layer.name.split(".")[0] in names for layer in layers(model)) and len(layers(model)) >= 12
    assert not names & set(model.peft_config["default"].target_modules)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(f"{name}.modules_to_save.default" in key for name in names for key in trained)
    move(model)
    with torch.no_grad():
        for name in names:
            for parameter in base.get_submodule(name).modules_to_save.default.parameters():
                parameter.normal_()
    model.save_pretrained(tmp_path)
    fresh = of_task(task, family)
    with torch.no_grad():
        for name in names:  # a fresh head, as a new process has
            for parameter in fresh.get_submodule(name).parameters():
                parameter.normal_()
    assert torch.equal(outputs(PeftModel.from_pretrained(fresh, tmp_path).eval()), outputs(model.eval()))


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_a_named_head_is_refused_and_the_model_left(task):
    model, head = of_task(task), "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    before, wish = state(model), outputs(model)
    config = OsoraConfig(r=2, task_type=task, target_modules=["query", head])
    with pytest.raises(ValueError, match=rf"target {head} is in {head}, which PEFT trains and saves whole for {task}"):
        get_peft_model(model, config)
    assert state(model) == before and torch.equal(outputs(model), wish)
    get_peft_model(model, OsoraConfig(r=2, task_type=task, target_modules=["query"]))  # may be adapted after all


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_class_of_peft_asks_too_late_leaves_the_model(task, method):
    """It has the adapter by then; with LoRA it keeps it."""
    model = Plain()
    before = state(model)
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(model, method(r=2, target_modules=["one"], task_type=task))
    assert state(model) == before
    assert isinstance(get_peft_model(model, method(r=2, target_modules=["one"])), PeftModel)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_lora_works_or_is_refused_by_name(method):
    own = {field.name for field in fields(method)}
    for option in {field.name for field in fields(LoraConfig)} - own:
        with pytest.raises(TypeError, match=f"{method.__name__} has no option '{option}', which is LoraConfig's: ."):
            method(**{option: 3})
        method(**{option: None})  # off: there is nothing that it would do


@pytest.mark.parametrize(
    ("option", "value", "cure"),
    [
        ("ensure_weight_tying", True, "trainable_token_indices"),
        ("target_parameters", ["experts.gate_up_proj"], "target_modules"),
        ("lora_dropout", 0.1, "use dropout"),
        ("lora_alpha", 16, "SorsaConfig has alpha"),
        ("init_lora_weights", "pissa", "init_weights"),
        ("layer_replication", [(0, 2)], "replicate the layers"),
    ],
)
def test_a_refused_option_says_what_to_use(option, value, cure):
    with pytest.raises(TypeError, match=cure):
        OsoraConfig(**{option: value})


def test_other_names_get_a_hint():
    with pytest.raises(TypeError, match="did you mean 'dropout'"):
        OsoraConfig(drop_out=0.1)
    with pytest.raises(TypeError, match="OSoRA's basis is fixed"):
        OsoraConfig(gamma=0.1)
    with pytest.raises(TypeError, match=r"OSoRA's O alone"):
        SorsaConfig(side="input")


def test_a_file_of_a_later_version_is_read_with_a_warning(tmp_path):
    """As of PEFT's methods: an option that nobody knows is left out and told."""
    OsoraConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 3', '"r": 3, "of_the_future": 1'))
    with pytest.warns(UserWarning, match="of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


# -- the configuration as an object ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["layers.0"]}])
def test_the_file_is_the_dict(method, options, tmp_path):
    config = method(r=4, **options)
    config.save_pretrained(tmp_path)
    assert method.from_json_file(tmp_path / "adapter_config.json") == config.to_dict()
    assert method.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_of_a_saved_adapter_the_file_is_the_dict_and_the_block(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    found = OsoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert found.pop("osora")["modules"]
    assert found | {"inference_mode": False, "auto_mapping": None} == model.peft_config["default"].to_dict()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("where", ["file", "new", "another model"])
@pytest.mark.parametrize("method", [LoraConfig, *METHODS])
def test_a_given_configuration_is_the_object_in_the_model(method, where, trainable, tmp_path):
    options = {"r": 4, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), method(**options))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
    ids = token_ids()
    wish = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "saved")
    config = {
        "file": lambda: PeftConfig.from_pretrained(tmp_path / "saved"),
        "new": lambda: method(**options),
        "another model": lambda: model.peft_config["default"],
    }[where]()
    other = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved", config=config, is_trainable=trainable).eval()
    assert other.peft_config["default"] is config and config.inference_mode is not trainable
    assert any(p.requires_grad for p in other.parameters()) is trainable
    assert torch.equal(other(ids).logits, wish) and torch.equal(model(ids).logits, wish)
    for each, folder in ((model, "first"), (other, "second")):  # both still know what they are
        each.save_pretrained(tmp_path / folder)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        assert torch.equal(again(ids).logits, wish)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_adapter_dtype_false_says_why_it_stays(method, dtype, tmp_path):
    with pytest.warns(RuntimeWarning, match="autocast_adapter_dtype=False changes nothing.*float32"):
        model = get_peft_model(tiny_llama(dtype=dtype), method(r=4), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match="autocast_adapter_dtype=False changes nothing"):
        PeftModel.from_pretrained(tiny_llama(dtype=dtype), tmp_path, autocast_adapter_dtype=False)


def test_autocast_adapter_dtype_false_of_a_float32_model_is_no_word():
    get_peft_model(tiny_llama(), OsoraConfig(r=4), autocast_adapter_dtype=False)  # warnings are errors here


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("method", [LoraConfig, *METHODS])
def test_nan_is_said_in_pefts_words(method, call):
    model = get_peft_model(tiny_llama(), method(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    words = r"^NaNs detected in the merged weights\. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=words):
        getattr(model, call)(safe_merge=True)


# -- targets and Trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[".q_proj"], ".q_proj", [".q_proj", "v_proj"], ".*.q_proj", "q_proj", ["q_proj"]])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:target_modules names '.q_proj', which no module has")  # PEFT is silent there
def test_targets_are_found_or_missed_as_loras(method, targets):
    def found(kind: type) -> object:
        try:
            return sorted(get_peft_model(tiny_llama(), kind(r=2, target_modules=targets)).targeted_module_names)
        except ValueError as error:
            return type(error), str(error)

    assert found(method) == found(LoraConfig)


@pytest.mark.parametrize("name", ["default", "medical"])
@pytest.mark.parametrize("method", [LoraConfig, *METHODS])
def test_trainer_reloads_the_best_of_several(method, name, tmp_path):
    """The active one of two adapters is trained, saved, and put back to its best step; the other is not touched."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), method(r=4, target_modules=["q_proj", "v_proj"]), adapter_name=name)
    model.add_adapter("other", method(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(name)
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 6)]
    others = {key: p.detach().clone() for key, p in model.named_parameters() if ".other" in key}
    scores = iter([3.0, 1.0, 2.0])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        eval_steps=1,
        save_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    seen = []

    class Seen(transformers.TrainerCallback):
        def on_evaluate(self, *_: object, **__: object) -> None:
            seen.append({key: p.detach().clone() for key, p in model.named_parameters() if f".{name}" in key})

    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:2],
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[Seen()],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    now = {key: p for key, p in model.named_parameters() if f".{name}" in key}
    expected = seen[1] if name == "default" else seen[2]  # transformers looks for "default" in a checkpoint's folder
    assert now.keys() == expected.keys() and all(torch.equal(now[key], expected[key]) for key in now)
    assert all(torch.equal(dict(model.named_parameters())[key], value) for key, value in others.items())
    assert model.active_adapter == name and all(p.requires_grad for p in now.values())


def test_the_document_names_every_option_that_is_refused():
    text = (ROOT / "docs/peft.md").read_text().split("## Not supported")[1]
    missing = {field.name for field in fields(LoraConfig)} - {field.name for field in fields(OsoraConfig)}
    assert not {name for name in missing if f"`{name}`" not in text}
