# SPDX-License-Identifier: Apache-2.0
"""The methods' ``BaseTuner``: an adapter's way into a model and out of it, as PEFT calls for it."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from osora.config import ALL_LINEAR
from osora.files.evidence import certificate_of
from osora.files.format import AdapterError, Description
from osora.layers.base_weight import base_weight
from osora.layers.first_step import watch_first_step
from osora.layers.formulas import formula_of
from osora.layers.penalty import Penalty
from osora.layers.quantised import allow_packing, keep_order
from osora.layers.read_weight import Place, Readers
from osora.layers.undo import AllOrNothing
from osora.model.targets import check_rank_pattern
from osora.peft import loading
from osora.peft.batch import rows_of_adapters
from osora.peft.combine import combine
from osora.peft.config import AdapterConfig
from osora.peft.filling import await_file, empty_basis, fill
from osora.peft.layer import AdapterLayer, layers_of
from osora.peft.linears import OsoraLinear, SorsaLinear
from osora.peft.parts import Adapter
from osora.peft.rollback import Before, put_originals
from osora.peft.targets import Surroundings, check_whole_modules, matches

# Attributes of the model without PEFT around it.
_PENALTIES = "_osora_penalties"  # adapter's name -> its penalty
_IN_ORDER = "_osora_in_order"  # quantised layers that may be packed when the last adapter is gone


class AdapterModel(BaseTuner):
    """A model with adapters of one method. What PEFT does with any method is :class:`peft.tuners.BaseTuner`'s."""

    layer_class: ClassVar[type[AdapterLayer]]
    target_module_mapping: dict = {}  # noqa: RUF012  # every model has "all-linear"

    # -- which layers --

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        description = self._description(peft_config)
        if description is not None and peft_config.target_modules == ALL_LINEAR:
            # the file names its modules: what is linear in this model is not asked
            peft_config.target_modules = set(description.modules)
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        found = matches(peft_config, key)
        if peft_config.osora is None:
            looked = self.__dict__.get("_around")  # None when PEFT asks after the adapter has come
            return False if found and looked is not None and looked.is_left_out(key) else found
        wanted = peft_config.__dict__.get("_wanted", ())
        return key in wanted or (found if type(found).__name__ == "_ExcludedModule" else False)

    # -- an adapter's way in --

    @torch.inference_mode(False)
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give the model an adapter, as PEFT does it, then all of its decompositions; or leave the model as it was."""
        config: Any = self.peft_config[adapter_name]
        if not adapter_name or "." in adapter_name:
            raise ValueError(
                f"an adapter's name must not be empty nor have a dot (it is part of state_dict keys): {adapter_name!r}"
            )
        if config.home is not None and config.home[0] is model and config.home[1] != adapter_name:
            config = self.peft_config[adapter_name] = copy.deepcopy(config)  # one object was given for two adapters
        description = self._description(config)
        if description is not None:
            config.__dict__["_wanted"] = frozenset(description.modules)
        befores: dict[str, Before] = self.__dict__.setdefault("_befores", {})
        biases = description is not None and config.bias != "none"
        try:
            befores[adapter_name] = Before(model, biases, () if description is None else description.other_names)
            self._made: list[tuple[AdapterLayer, bool]] = []
            self._around = Surroundings(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._around.leave_out(config)
            layers = [layer for layer, _ in self._made]
            if not layers:  # PEFT before 0.21 takes a further adapter that is in no layer
                raise ValueError(f"target_modules {config.target_modules!r} of {adapter_name!r} not found in the model")
            if description is None:
                check_rank_pattern(config.rank_pattern, [layer.name for layer in layers])
                self._around.warn_of_unmatched()
                fill(layers, adapter_name, config)
            else:
                await_file(layers, adapter_name, config, description)
            model.__dict__.setdefault(_IN_ORDER, []).extend(keep_order(model))
            self._settle(config, model, adapter_name)
            self._penalise(model, adapter_name, layers, config)
            named = {layer.name: layer for layer in layers}
            watch_first_step(named, lambda layer: layer.trained_kinds(adapter_name).values())
        except BaseException:
            self._take_out(model, adapter_name)
            raise
        finally:
            self.__dict__.pop("_made", None)
            self.__dict__.pop("_around", None)
        if description is None:
            del befores[adapter_name]

    @staticmethod
    def _settle(config: Any, model: nn.Module, name: str) -> None:
        """The object that was given stays the adapter's. A model that it came from, if any, keeps a copy of it."""
        home = config.home
        config.settle_in(model, name)
        if home is None or home[0] is model:
            return
        others = getattr(home[0], "peft_config", {})
        if others.get(home[1]) is config:
            others[home[1]] = copy.deepcopy(config)
            others[home[1]].settle_in(*home)

    @staticmethod
    def _penalise(model: nn.Module, name: str, layers: list[AdapterLayer], config: Any) -> None:
        """SORSA's penalty counts as long as it lives, which is as long as the model has the adapter."""
        penalties = model.__dict__.setdefault(_PENALTIES, {})
        penalties.pop(name, None)
        if any(layer.adapters[name].formula.penalised(layer.basis(name), layer.deltas(name)) for layer in layers):
            penalties[name] = Penalty(layers, name, config.gamma, config.regularizer)  # type: ignore[arg-type]

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        is_new = not isinstance(target, self.layer_class)
        layer: Any = target
        if is_new:
            self._around.check(current_key, target)
            layer = self.layer_class(target, current_key)
            layer.place = Place(current_key, self.__dict__.setdefault("readers", Readers()))
        boxes = [f"{current_key}.{box}" for box in (*layer.adapter_layer_names, *layer.other_param_names)]
        check_whole_modules(peft_config.modules_to_save or (), [*boxes, *(f"{box}.{adapter_name}" for box in boxes)])
        adapter = Adapter(
            formula_of(peft_config.native()), peft_config.dropout, peft_config.save_basis, tol=peft_config.tol
        )
        description = self._description(peft_config)
        if description is None:
            asked, most = peft_config.native().rank_for(current_key), min(layer.out_features, layer.in_features)
            layer.add(adapter_name, adapter, min(asked, most))
        else:
            item = description.modules[current_key]
            if (item["out_features"], item["in_features"]) != (layer.out_features, layer.in_features):
                raise AdapterError(
                    f"the adapter's {current_key} is {[item['out_features'], item['in_features']]}, this model's is "
                    f"{[layer.out_features, layer.in_features]}"
                )
            adapter.awaited, adapter.save_basis = description, description.save_basis
            adapter.certificate = certificate_of(item)
            layer.add(adapter_name, adapter, item["rank"], fill=float("nan"))
        self._made.append((layer, is_new))
        empty_basis(layer, adapter_name)
        if is_new:
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Without PEFT's move to the base's device: all is there, or on the meta device until a file has come."""
        setattr(parent, child_name, new_module)

    # -- an adapter from a file --

    @staticmethod
    def _description(config: AdapterConfig) -> Description | None:
        if config.osora is None:
            return None
        kept = config.__dict__.get("_description")
        if kept is None or kept[0] is not config.osora:
            kept = config.__dict__["_description"] = (config.osora, config.description())
        return kept[1]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT calls this when it has made or loaded an adapter: a loaded one is checked. Nothing is cast."""
        self._say_that_it_is_float32(adapter_name, autocast_adapter_dtype)
        if self.peft_config[adapter_name].__dict__.get("_replacing"):  # whoever replaces it checks it
            return
        layers = layers_of(self.model, adapter_name).values()
        try:
            arrived = loading.settle(layers, adapter_name)
        except BaseException:  # refused, or the user's
            self._take_out(self.model, adapter_name)
            raise
        if arrived:
            config: Any = self.peft_config[adapter_name]
            config.osora = None
            self.__dict__.get("_befores", {}).pop(adapter_name, None)

    def _say_that_it_is_float32(self, name: str, autocast_adapter_dtype: bool) -> None:
        layers = layers_of(self.model, name).values()
        if not autocast_adapter_dtype and any(each.exact != base_weight(each.base_layer).dtype for each in layers):
            warnings.warn(
                "autocast_adapter_dtype=False changes nothing for osora's adapters: what they train stays float32, "
                "since 16 bits would round most steps away (docs/peft.md)",
                RuntimeWarning,
                stacklevel=4,
            )

    # -- an adapter's way out --

    def _take_out(self, model: nn.Module, name: str) -> None:
        """Remove an adapter that could not be completed, layers that have no other, and whole modules of its own."""
        put_originals(model, name)
        for key, layer in list(layers_of(model, name).items()):
            layer.adapters.pop(name)
            BaseTunerLayer.delete_adapter(layer, name)
            if not layer.adapters:
                parent, _, last = key.rpartition(".")
                setattr(model.get_submodule(parent), last, layer.base_layer)
        if (before := self.__dict__.get("_befores", {}).pop(name, None)) is not None:
            before.restore()
        self.peft_config.pop(name, None)
        model.__dict__.get(_PENALTIES, {}).pop(name, None)
        if not self.peft_config:
            self._forget(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Raises ValueError for one that is not there, or is merged."""
        with AllOrNothing(self):
            super().delete_adapter(adapter_name)
            self.model.__dict__.get(_PENALTIES, {}).pop(adapter_name, None)

    def unmerge_adapter(self) -> None:
        """Unmerge all layers or, if it is interrupted, none."""
        with AllOrNothing(*(module for module in self.model.modules() if isinstance(module, AdapterLayer))):
            super().unmerge_adapter()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into all layers or, if one cannot be, into none. See :meth:`AdapterLayer.merge`.

        Raises:
            ValueError: an adapter that the model does not have; a merged weight that is not finite.
        """
        self._check_there(adapter_names)
        with self._all_or_none():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_there(self, adapter_names: object) -> None:
        if isinstance(adapter_names, list | tuple):
            for name in adapter_names:
                if name not in self.peft_config:
                    raise ValueError(f"there is no adapter {name!r}: the model has {', '.join(self.peft_config)}")

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            yield
        except BaseException:  # of the user, or for want of memory, too
            for layer, merged in zip(layers, before, strict=True):
                if layer.merged_adapters != merged or bool(getattr(layer, "base_kept", merged)) != bool(merged):
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=merged)
            raise

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Merged as a whole before a layer is unloaded; or not merged: the base's own weights and modules."""
        layers: list[Any] = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        own = [layer for layer in layers if isinstance(layer, AdapterLayer)]
        if merge:
            self._check_there(kwargs.get("adapter_names"))
            with self._all_or_none():
                for layer in layers:
                    layer.merge(safe_merge=kwargs.get("safe_merge", False), adapter_names=kwargs.get("adapter_names"))
        for layer in layers:  # PEFT's own layers will be merged again as they are unloaded: now it cannot fail
            if layer.merged_adapters and not (merge and isinstance(layer, AdapterLayer)):
                layer.unmerge()
        if not merge:
            put_originals(self.model)
        return self._unload(merge, own, kwargs)

    def _unload(self, merge: bool, layers: list[AdapterLayer], kwargs: dict[str, Any]) -> Any:
        for layer in layers:  # merged already: PEFT's own call finds nothing to do
            layer.adapters.clear()
            layer.set_adapter([])
        plain = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        self._forget(self.model)  # PEFT 0.18 leaves peft_config there
        return plain

    @staticmethod
    def _forget(model: nn.Module) -> None:
        """What the model knows of adapters, when it has none any more."""
        allow_packing(model.__dict__.pop(_IN_ORDER, ()))
        for attribute in ("peft_config", _PENALTIES):
            model.__dict__.pop(attribute, None)
        if "_hf_peft_config_loaded" in model.__dict__:  # by which transformers' own integration knows of adapters
            model._hf_peft_config_loaded = False  # type: ignore[assignment]

    # -- a batch of several --

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        with rows_of_adapters(self.model, names, kwargs.get("num_beams")):
            yield

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of a pickle, which keeps no configuration's model."""
        super().__setstate__(state)
        config: Any
        for name, config in self.peft_config.items():
            config.settle_in(self.model, name)


class OsoraModel(AdapterModel):
    """OSoRA for PEFT."""

    prefix = "osora_"
    tuner_layer_cls = OsoraLinear
    layer_class = OsoraLinear

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose o and s are weighted sums of others'; it waits (:mod:`osora.peft.combine`).

        Raises:
            ValueError: another ``combination_type``, an adapter that is not there, a name that is taken, lists of
                different lengths, weights that are not finite, adapters that share no basis, or that train more than
                their layers (``modules_to_save``, ``trainable_token_indices``).
        """
        if combination_type != "linear":
            raise ValueError(
                f'combination_type must be "linear", got {combination_type!r}: OSoRA has no other; osora.export_lora '
                "makes LoRA adapters of OSoRA's, which PEFT combines in its other ways"
            )
        if missing := [each for each in adapters if each not in self.peft_config]:
            raise ValueError(f"there is no adapter {missing[0]!r}: the model has {', '.join(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"the model has an adapter {adapter_name!r} already")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"adapters and weights must have one length, got {len(adapters)} and {len(weights)}")
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights must be finite numbers, got {weights!r}")
        for each in adapters:
            config: Any = self.peft_config[each]
            if config.modules_to_save or config.trainable_token_indices:
                raise ValueError(
                    f"{each!r} trains whole modules or rows of embeddings (modules_to_save={config.modules_to_save!r}, "
                    f"trainable_token_indices={config.trainable_token_indices!r}), of which there is no weighted sum"
                )
        with AllOrNothing(self):
            config = combine(self.model, self.peft_config, adapters, weights, adapter_name)
            self.peft_config[adapter_name] = config
            config.settle_in(self.model, adapter_name)


class SorsaModel(AdapterModel):
    """SORSA for PEFT. The steps of optimisers add the penalty's gradient (:mod:`osora.layers.penalty`)."""

    prefix = "sorsa_"
    tuner_layer_cls = SorsaLinear
    layer_class = SorsaLinear


__all__ = ["AdapterModel", "OsoraModel", "SorsaModel"]
