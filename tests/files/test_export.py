# SPDX-License-Identifier: Apache-2.0
"""An exported LoRA in plain PEFT, in a process where osora cannot be imported, gives the adapter's logits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import logits, move_adapter, run_python, tiny_bert, tiny_gpt2, tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from saved_adapters import adapted, edit, edit_tensors
from torch import Tensor, nn

import osora
from osora import AdapterError, OsoraConfig, SorsaConfig

pytest.importorskip("peft")

# Of every folder given: base/, lora/ and ids.safetensors, to logits.safetensors. Warnings are errors: a wrong config
# speaks through them.
IN_PLAIN_PEFT = """
import json, sys, warnings
from pathlib import Path
sys.modules["osora"] = None  # importing it fails from here on
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
for folder in map(Path, sys.argv[1:]):
    kind = json.loads((folder / "base/config.json").read_text())["architectures"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # peft about transformers
        base = getattr(transformers, kind).from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "lora").eval()
        ids = load_file(folder / "ids.safetensors")["ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            merged = model.merge_and_unload()(input_ids=ids).logits
    save_file({"logits": logits, "merged": merged}, folder / "logits.safetensors")
"""


def ranks(lora: Path) -> dict[str, int]:
    tensors = load_file(lora / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith("lora_A.weight")
    }


@dataclass
class Case:
    """A model with adapters, and how the LoRA is written; the active adapter's logits are to come back."""

    make: Callable[[], nn.Module]
    export: Callable[[nn.Module, Path], None]
    config: dict
    method: type = OsoraConfig


def export_model(model: nn.Module, folder: Path) -> None:
    osora.export_lora(model, folder / "lora", equal_ranks=False)


def export_equal_ranks(model: nn.Module, folder: Path) -> None:
    osora.export_lora(model, folder / "lora", equal_ranks=True)


def export_folder(model: nn.Module, folder: Path) -> None:
    osora.save_adapter(model, folder / "adapter")
    osora.export_lora(folder / "adapter", folder / "lora", equal_ranks=False)


def export_without_basis(model: nn.Module, folder: Path) -> None:
    osora.save_adapter(model, folder / "adapter", save_basis=False)
    osora.export_lora(folder / "adapter", folder / "lora", folder / "base", equal_ranks=False)


def export_waiting(model: nn.Module, folder: Path) -> None:
    """The active one is not the one that is written, and its numbers are others."""
    osora.add_adapter(model, "other", OsoraConfig(r=2, target_modules=["v_proj", "up_proj"]))
    osora.set_adapter(model, "other")
    move_adapter(model, 1.0)
    with osora.disabled(model):
        osora.export_lora(model, folder / "lora", name="default", equal_ranks=False)
    osora.set_adapter(model, "default")


def export_merged(model: nn.Module, folder: Path) -> None:
    osora.merge(model)
    osora.export_lora(model, folder / "lora", equal_ranks=False)
    osora.unmerge(model)


# Two ranks, and layers without the adapter.
TWO = {"rank_pattern": {r"layers?\.1\..*|layer\.1\..*|h\.1\..*": 3}, "exclude_modules": ["k_proj", "c_fc", "key"]}
CASES = {
    "llama": Case(tiny_llama, export_model, TWO),
    "gpt2": Case(tiny_gpt2, export_model, TWO),
    "bert": Case(tiny_bert, export_model, TWO),
    "untied head": Case(lambda: tiny_llama(tied=False), export_model, {"target_modules": ["lm_head", "q_proj"]}),
    "equal ranks": Case(tiny_llama, export_equal_ranks, TWO),
    "from a folder": Case(tiny_llama, export_folder, TWO),
    "without basis": Case(tiny_gpt2, export_without_basis, TWO),
    "waiting": Case(tiny_llama, export_waiting, TWO),
    "merged": Case(tiny_llama, export_merged, TWO),
    "sorsa": Case(tiny_gpt2, export_model, TWO, SorsaConfig),
    "o alone": Case(tiny_llama, export_model, TWO | {"train": "o"}),
    "s alone, from a folder": Case(tiny_llama, export_folder, TWO | {"train": "s"}),
    "O on the input side": Case(tiny_gpt2, export_model, TWO | {"side": "input"}),
    "O on the input side, from a folder": Case(tiny_llama, export_folder, TWO | {"side": "input", "initial_o": -0.5}),
    "initial O": Case(tiny_llama, export_without_basis, TWO | {"initial_o": 0.0}),
    "sorsa from a folder": Case(tiny_llama, export_folder, TWO | {"alpha": 7.0}, SorsaConfig),
}
IDS = "ids.safetensors"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[Path, Tensor, nn.Module]]:
    """Case → its folder, the logits to come back, the model; one process has run plain PEFT on all of them."""
    found = {}
    for name, case in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        ids = token_ids(3, 7)
        save_file({"ids": ids}, folder / IDS)
        case.make().save_pretrained(folder / "base")
        model = osora.attach(case.make(), case.method(**({"r": 5, "tol": 1e-4} | case.config)))
        move_adapter(model, 0.2 if case.method is OsoraConfig else 0.03)  # SORSA's are entries of unit columns
        wish = logits(model, ids)
        case.export(model, folder)
        assert torch.equal(logits(model, ids), wish), "the model was changed"
        found[name] = folder, wish, model
    run_python(IN_PLAIN_PEFT, *(folder for folder, _, _ in found.values()))
    return found


@pytest.mark.parametrize("name", CASES)
def test_plain_peft_gives_the_adapters_logits(name, exported):
    folder, wish, model = exported[name]
    got = load_file(folder / "logits.safetensors")
    # Float32: the same products, summed in another order.
    torch.testing.assert_close(got["logits"], wish, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["merged"], wish, rtol=0, atol=1e-5)
    with osora.disabled(model):
        ids = load_file(folder / IDS)["ids"]
        assert (wish - logits(model, ids)).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_are_the_adapters(name, exported):
    folder, _, model = exported[name]
    adapter_ranks = {m.name: m.rank for m in osora.summary(model).modules}
    if name.startswith("sorsa"):
        adapter_ranks = {module: 2 * rank for module, rank in adapter_ranks.items()}
    if name == "equal ranks":
        adapter_ranks = dict.fromkeys(adapter_ranks, 5)
    assert ranks(folder / "lora") == adapter_ranks
    if name not in ("untied head", "equal ranks"):
        assert set(adapter_ranks.values()) == ({6, 10} if name.startswith("sorsa") else {3, 5})
    lora = load_file(folder / "lora/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in lora.values())


@pytest.mark.parametrize("name", CASES)
def test_one_alpha_over_a_tensors_own_rank_is_the_adapters_change(name, exported):
    """As llama.cpp reads a LoRA: one alpha for all, over the rank of each tensor; patterns are not read."""
    folder, _, model = exported[name]
    lora = load_file(folder / "lora/adapter_model.safetensors")
    config = json.loads((folder / "lora/adapter_config.json").read_text())
    assert config["alpha_pattern"] == {}
    for module, layer in osora.adapted_layers(model).items():
        A, B = (lora[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        change = config["lora_alpha"] / len(A) * B @ A
        torch.testing.assert_close(change, layer.delta_weight(), rtol=0, atol=1e-5 * float(change.abs().max()))
        if name == "equal ranks":  # vLLM's rule, for which equal_ranks is
            assert len(A) == config["r"] == config["lora_alpha"]


def test_ranks_that_differ_are_told(tmp_path):
    """A reader of one alpha over one r gets another change, whatever the file says: no scale is right for both."""
    model = adapted(r=5, rank_pattern={"q_proj": 3})
    with pytest.warns(RuntimeWarning, match=r"ranks from 3 to 5.*vLLM.*equal_ranks=True"):
        osora.export_lora(model, tmp_path / "lora")
    osora.export_lora(model, tmp_path / "lora", equal_ranks=True)  # warnings are errors here
    osora.export_lora(model, tmp_path / "lora", equal_ranks=False)


def test_two_files_and_no_trace_of_osora(exported):
    for folder, _, _ in exported.values():
        assert sorted(p.name for p in (folder / "lora").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        config = json.loads((folder / "lora/adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and "osora" not in json.dumps(config)
    configs = {n: json.loads((f / "lora/adapter_config.json").read_text()) for n, (f, _, _) in exported.items()}
    assert configs["gpt2"]["fan_in_fan_out"] and configs["without basis"]["fan_in_fan_out"]
    assert not configs["llama"]["fan_in_fan_out"]
    assert configs["llama"]["task_type"] == "CAUSAL_LM" and configs["bert"]["task_type"] is None
    assert configs["equal ranks"]["rank_pattern"] == {}


class Net(nn.Module):
    """Names of which one is another's end, one that is a regular expression of another, and a module with two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"q": nn.Linear(12, 12), "xq": nn.Linear(12, 9), "x_q": nn.Linear(12, 9)})
        self.twice = nn.Linear(12, 12)
        self.again = self.twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner["q"](self.q(x)).relu()
        return self.inner["xq"](y) + self.inner["x_q"](self.again(self.twice(y)))


def in_peft(model: nn.Module, lora: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, lora).eval()


@pytest.mark.parametrize("wanted", ["q", "inner.xq|q", "inner.q|inner.x_q"])
def test_names_that_are_ends_of_others(wanted, tmp_path):
    model = osora.attach(Net().eval(), OsoraConfig(r=4, target_modules=wanted, rank_pattern={wanted.split("|")[0]: 3}))
    move_adapter(model, 0.5)
    osora.export_lora(model, tmp_path, equal_ranks=False)
    x = torch.randn(5, 12)
    peft = in_peft(Net().eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft(x), model(x), rtol=0, atol=1e-5)
    adapted_there = {n for n, m in peft.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted_there == {m.name for m in osora.summary(model).modules}


def test_a_module_with_two_names_is_refused(tmp_path):
    model = osora.attach(Net(), OsoraConfig(r=4, target_modules=["twice"]))
    with pytest.raises(ValueError, match="twice is one module with the names twice, again"):
        osora.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [OsoraConfig, SorsaConfig])
def test_the_change_is_exact_for_every_dtype(method, dtype, tmp_path):
    """B A against the papers' formulas in float64."""
    model = osora.attach(tiny_llama(dtype=dtype), method(r=5))
    move_adapter(model, 0.2)
    osora.export_lora(model, tmp_path)
    lora = load_file(tmp_path / "adapter_model.safetensors")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for name, layer in osora.adapted_layers(model).items():
        U, V, S0, s = (t.detach().double() for t in (layer.U, layer.V, layer.S0, layer.s))
        if method is OsoraConfig:
            o = layer.o.detach().double()
            left, right = (1 + o)[:, None] * U * (S0 + s), V
        else:
            left, right = (U + layer.u.detach().double()) * (S0 + s), V + layer.v.detach().double()
        change = left @ right.t() - U * S0 @ V.t()
        B, A = (lora[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "BA")
        assert B.dtype == A.dtype == exact
        # An entry of B or A has a few roundings; in float64 so has the formula above
        sizes = left.abs() @ right.abs().t() + U.abs() * S0 @ V.abs().t()
        assert (B.double() @ A.double() - change).abs().max() <= 4 * torch.finfo(exact).eps * sizes.max()


def test_a_folder_without_its_basis_needs_the_base(tmp_path):
    osora.save_adapter(adapted(), tmp_path / "adapter", save_basis=False)
    with pytest.raises(AdapterError, match=r"without its basis.*pass base"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    other = tiny_llama()
    nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj is not the one this adapter was trained on"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora", tmp_path / "other")
    assert not (tmp_path / "lora").exists()


def test_a_folder_whose_options_were_changed_is_refused(tmp_path):
    """The basis in it is enough to export it, and loading would refuse it."""
    model = osora.attach(tiny_llama(), SorsaConfig(r=4, alpha=4.0))
    osora.save_adapter(move_adapter(model), tmp_path / "adapter")
    edit(tmp_path / "adapter", lambda config: config.update(alpha=8.0))
    with pytest.raises(AdapterError, match="its options were changed"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_has_no_meaning_is_refused(tmp_path):
    model = adapted()
    osora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="base is for the folder"):
        osora.export_lora(model, tmp_path / "lora", tmp_path)
    with pytest.raises(ValueError, match="name is for a model"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora", name="default")
    with pytest.raises(ValueError, match="has no adapter 'news'; it has 'default'"):
        osora.export_lora(model, tmp_path / "lora", name="news")
    with pytest.raises(ValueError, match=r"no osora adapter: call osora\.attach"):
        osora.export_lora(tiny_llama(), tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match="no adapter here"):
        osora.export_lora(tmp_path, tmp_path / "lora")
    model.model.layers[0].mlp.up_proj.o.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj has NaN or infinite values"):
        osora.export_lora(model, tmp_path / "lora")
    edit_tensors(tmp_path / "adapter", lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.osora_o.weight"))
    with pytest.raises(AdapterError, match="lacks 1 tensors"):
        osora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_is_not_replaced_by_its_lora(tmp_path, monkeypatch):
    osora.save_adapter(adapted(), tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, which a LoRA of the same file names would replace"):
        osora.export_lora(tmp_path / "adapter", ".")
    assert osora.adapter_info(tmp_path / "adapter").method == "osora"
    with pytest.raises(ValueError, match="holds an adapter, which a LoRA of the same file names would replace"):
        osora.export_lora(adapted(), tmp_path / "adapter")  # nor is one by another adapter's
    assert osora.adapter_info(tmp_path / "adapter").method == "osora"
    osora.export_lora(adapted(), tmp_path / "lora")
    osora.export_lora(adapted(), tmp_path / "lora")  # a LoRA may be written anew


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    model = adapted()
    osora.export_lora(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    move_adapter(model, 0.3)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        osora.export_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # transformers' own
def test_a_model_of_peft_is_refused_and_its_folder_is_the_way(tmp_path):
    from peft import get_peft_model

    from osora.peft import OsoraConfig as PeftConfig

    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model, ids = get_peft_model(base, PeftConfig(r=4, tol=1e-4, side="input", init_weights=False)), token_ids()
    with pytest.raises(ValueError, match=r"model\.save_pretrained\(folder\).*export_lora\(folder, path\)"):
        osora.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    model.save_pretrained(tmp_path / "adapter")
    osora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    plain = in_peft(type(base).from_pretrained(tmp_path / "base"), tmp_path / "lora")
    # float32: the same products, summed in another order
    torch.testing.assert_close(logits(plain, ids), logits(model.eval(), ids), rtol=0, atol=1e-5)
