# SPDX-License-Identifier: Apache-2.0
"""Random lives of a model with adapters: the base is never touched, what is saved is what loads, errors have words."""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import osora
import osora.peft

NAMES = st.sampled_from(["default", "second", "o", "0", "base_layer"])
METHODS = st.sampled_from(["OsoraConfig", "SorsaConfig"])
TARGETS = st.sampled_from([["a", "b", "c"], ["a"], ["b", "c"], ["nothing"], "all-linear"])
WHOLE = st.sampled_from([None, ["c"], ["b"], ["a", "c"], ["nobody"]])
RANKS = st.integers(1, 5)
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
# What a user may be told. torch's own refusals are RuntimeErrors.
TOLD = (ValueError, RuntimeError, NotImplementedError)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


BASE = {name: p.detach().clone() for name, p in Net().named_parameters()}
PLAIN = Net()(X).detach()


class Life(RuleBasedStateMachine):
    """What native and PEFT's lives have in common."""

    model: nn.Module

    def told(self, call: Callable[[], Any]) -> Any:
        """What a call gives, or None where it is refused in words."""
        try:
            return call()
        except TOLD as error:
            assert str(error).strip(), f"a bare {type(error).__name__}"
            return None

    def adapted(self) -> bool:
        return any(hasattr(module, "base_layer") for module in self.model.modules())

    def weights(self) -> dict[str, Tensor]:
        """The base's parameters, also of layers that hold a merged weight now."""
        found = {}
        for name in ("a", "b", "c"):
            layer = self.model.get_submodule(self.path(name))
            base = layer.base() if hasattr(layer, "base_kept") else getattr(layer, "base_layer", layer)
            found[f"{name}.weight"] = base.weight
            found[f"{name}.bias"] = (layer.base_layer if hasattr(layer, "base_layer") else layer).bias
        return found

    def path(self, name: str) -> str:
        return name

    @initialize(method=METHODS, rank=RANKS, name=NAMES, modules=st.sampled_from([["a", "b", "c"], ["a", "b"], None]))
    def begin(self, method: str, rank: int, name: str, modules: list[str] | None) -> None:
        self.model = Net().eval()
        if modules is not None:
            self.first(method, rank, name, modules)

    def first(self, method: str, rank: int, name: str, modules: list[str]) -> None:
        raise NotImplementedError

    @invariant()
    def the_base_is_untouched(self) -> None:
        for name, value in self.weights().items():
            assert torch.equal(value, BASE[name]), f"{name} has changed"

    @invariant()
    def the_output_is_finite(self) -> None:
        with torch.no_grad():
            assert torch.isfinite(self.model(X)).all()

    @rule(lr=st.sampled_from([1e-3, 1e-1]))
    def train_a_step(self, lr: float) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained or not self.adapted():
            return
        before = self.model(X).detach()
        loss = self.model.train()(X).square().mean()
        if loss.requires_grad:
            loss.backward()
            optimizer = torch.optim.SGD(trained, lr=lr)
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()
        assert before.shape == self.model(X).shape

    @rule()
    def copy_it(self) -> None:
        y = self.model(X).detach()
        self.model = copy.deepcopy(self.model)
        assert torch.equal(self.model(X), y)

    @rule()
    def save_all_of_it(self) -> None:
        memory = io.BytesIO()
        torch.save(self.model.state_dict(), memory)
        memory.seek(0)
        y = self.model(X).detach()
        self.model.load_state_dict(torch.load(memory, weights_only=True))
        assert torch.equal(self.model(X), y)


class NativeLife(Life):
    def first(self, method: str, rank: int, name: str, modules: list[str]) -> None:
        osora.attach(self.model, getattr(osora, method)(r=rank, target_modules=modules), name=name)

    @rule(method=METHODS, rank=RANKS, modules=TARGETS, whole=WHOLE, name=NAMES)
    def attach(self, method: str, rank: int, modules: Any, whole: Any, name: str) -> None:
        config = getattr(osora, method)(r=rank, target_modules=modules, modules_to_save=whole)
        y = self.model(X).detach()
        if self.told(lambda: osora.attach(self.model, config, name=name)) is not None:
            assert torch.equal(self.model(X), y)

    @rule(method=METHODS, rank=RANKS, modules=TARGETS, whole=WHOLE, name=NAMES)
    def add(self, method: str, rank: int, modules: Any, whole: Any, name: str) -> None:
        config = getattr(osora, method)(r=rank, target_modules=modules, modules_to_save=whole)
        y = self.model(X).detach()
        self.told(lambda: osora.add_adapter(self.model, name, config))
        assert torch.equal(self.model(X), y), "a further adapter waits"

    @rule(name=NAMES)
    def select(self, name: str) -> None:
        self.told(lambda: osora.set_adapter(self.model, name))

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.told(lambda: osora.remove_adapter(self.model, name))

    @rule()
    def merge(self) -> None:
        y = self.model(X).detach()
        self.told(lambda: osora.merge(self.model))
        torch.testing.assert_close(self.model(X), y, rtol=1e-4, atol=1e-5)

    @rule()
    def unmerge(self) -> None:
        y = self.model(X).detach()
        self.told(lambda: osora.unmerge(self.model))
        torch.testing.assert_close(self.model(X), y, rtol=1e-4, atol=1e-5)

    @rule(plan=st.sampled_from(["split", "materialised", "neither"]))
    def execute(self, plan: str) -> None:
        y = self.model(X).detach()
        self.told(lambda: osora.set_execution(self.model, plan))
        torch.testing.assert_close(self.model(X), y, rtol=1e-4, atol=1e-5)

    @rule()
    def disable(self) -> None:
        def off() -> None:
            with osora.disabled(self.model):
                assert torch.equal(self.model(X), PLAIN)

        y = self.model(X).detach()
        self.told(off)
        assert torch.equal(self.model(X), y)

    @rule(merged=st.booleans())
    def detach(self, merged: bool) -> None:
        if merged:  # which changes the base for good: tried on a copy
            other = copy.deepcopy(self.model)
            if self.told(lambda: osora.detach(other, merged=True)) is not None:
                torch.testing.assert_close(other(X), self.model(X), rtol=1e-4, atol=1e-5)
            return
        if self.told(lambda: osora.detach(self.model)) is not None:
            assert torch.equal(self.model(X), PLAIN) and not self.adapted()
            assert all(p.requires_grad for p in self.model.parameters())

    @rule(name=NAMES)
    def save_and_load(self, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            y = self.model(X).detach()
            if self.told(lambda: osora.save_adapter(self.model, folder) or True) is None:
                return
            loaded = osora.load_adapter(Net().eval(), folder, name=name)
            torch.testing.assert_close(loaded(X), y, rtol=1e-4, atol=1e-5)

    @rule(name=NAMES)
    def load_beside(self, name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if self.told(lambda: osora.save_adapter(self.model, folder) or True) is not None:
                y = self.model(X).detach()
                self.told(lambda: osora.load_adapter(self.model, folder, name=name))
                torch.testing.assert_close(self.model(X), y, rtol=1e-4, atol=1e-5)

    @rule()
    def pickle_it(self) -> None:
        y = self.model(X).detach()
        self.model = pickle.loads(pickle.dumps(self.model))
        assert torch.equal(self.model(X), y)

    @rule()
    def look(self) -> None:
        self.told(lambda: str(osora.summary(self.model)))
        self.told(lambda: osora.adapter_names(self.model))
        self.told(lambda: osora.active_adapter(self.model))
        osora.count_parameters(self.model)
        repr(self.model)


class PeftLife(Life):
    def first(self, method: str, rank: int, name: str, modules: list[str]) -> None:
        config = getattr(osora.peft, method)(r=rank, target_modules=modules)
        self.model = get_peft_model(self.model, config, adapter_name=name).eval()

    def path(self, name: str) -> str:
        return f"base_model.model.{name}" if isinstance(self.model, PeftModel) else name

    @rule(method=METHODS, rank=RANKS, modules=TARGETS, name=NAMES)
    def attach(self, method: str, rank: int, modules: Any, name: str) -> None:
        config = getattr(osora.peft, method)(r=rank, target_modules=modules)
        y = self.model(X).detach()
        if isinstance(self.model, PeftModel):
            if name in self.model.peft_config:  # PEFT gives the adapter another start, without a word
                return
            self.told(lambda: self.model.add_adapter(name, config))
            torch.testing.assert_close(self.model(X), y, rtol=1e-4, atol=1e-5)
        else:
            made = self.told(lambda: get_peft_model(self.model, config, adapter_name=name))
            self.model = self.model if made is None else made.eval()
            assert torch.equal(self.model(X), y)

    @rule(name=NAMES)
    def select(self, name: str) -> None:
        if isinstance(self.model, PeftModel):
            self.told(lambda: self.model.set_adapter(name))

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        # Of the active one PeftModel keeps the name, and then fails with a KeyError, with LoRA too.
        if isinstance(self.model, PeftModel) and name not in self.model.active_adapters:
            self.told(lambda: self.model.delete_adapter(name))

    @rule()
    def merge(self) -> None:
        if isinstance(self.model, PeftModel):
            y = self.model(X).detach()
            self.told(self.model.merge_adapter)
            torch.testing.assert_close(self.model(X), y, rtol=1e-4, atol=1e-5)

    @rule()
    def unmerge(self) -> None:
        if isinstance(self.model, PeftModel):
            self.told(self.model.unmerge_adapter)

    @rule()
    def disable(self) -> None:
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                assert torch.equal(self.model(X), PLAIN)

    @rule()
    def unload(self) -> None:
        if isinstance(self.model, PeftModel):
            plain = self.told(self.model.unload)
            if plain is not None:
                assert torch.equal(plain(X), PLAIN)
                self.model = plain

    @rule()
    def save_and_load(self) -> None:
        if not isinstance(self.model, PeftModel):
            return
        with tempfile.TemporaryDirectory() as folder:
            if self.told(lambda: self.model.save_pretrained(folder) or True) is None:
                return
            for name in self.model.peft_config:
                place = folder if name == "default" else str(Path(folder, name))
                loaded = self.told(lambda place=place: PeftModel.from_pretrained(Net().eval(), place).eval())
                assert loaded is not None, f"{name} was saved and does not load"
                if self.model.active_adapters == [name] and not any(
                    layer.merged_adapters for layer in self.model.modules() if hasattr(layer, "merged_adapters")
                ):
                    torch.testing.assert_close(loaded(X), self.model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("life", [NativeLife, PeftLife])
def test_random_lives(life):
    _live(life, 25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("life", [NativeLife, PeftLife])
def test_five_hundred_random_lives(life):
    _live(life, 250)


def _live(life: type[Life], examples: int) -> None:
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
