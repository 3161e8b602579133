# SPDX-License-Identifier: Apache-2.0
"""SVD-initialised fine-tuning that never touches the base weight. Start with README.md or :func:`attach`."""

from osora import ops as ops  # its operators exist as soon as osora is imported
from osora._load import extension
from osora.analysis.changes import ChangeRecorder, Changes, WeightChange, weight_change, weight_changes
from osora.analysis.plots import plot_changes, plot_spectra
from osora.config import OsoraConfig, SorsaConfig
from osora.files.adapter import save_adapter
from osora.files.attach import attach
from osora.files.basis_layer import BasisError
from osora.files.card import write_card
from osora.files.export import export_lora
from osora.files.format import AdapterError
from osora.files.info import AdapterInfo, SavedModule, adapter_info
from osora.files.load import load_adapter
from osora.files.merge import MergedFolder, merge_saved
from osora.files.restore_basis import restore_basis
from osora.files.resume import checkpoint_adapters, restore_adapter
from osora.files.verify import ModuleCheck, Verification, verify_adapter
from osora.initialisation.check import BasisCheck, LayerCheck, check_basis
from osora.initialisation.request import InitialisationPlan
from osora.initialisation.run import Initialised, initialise, plan_initialisation
from osora.layers.penalty import orthonormality
from osora.model.adapters import (
    active_adapter,
    adapter_names,
    adapters_in_batch,
    add_adapter,
    remove_adapter,
    set_adapter,
)
from osora.model.attach import detach, disabled
from osora.model.cost import Estimate, Machine, estimate
from osora.model.execution import refresh, set_execution
from osora.model.merge import merge, unmerge
from osora.model.numbers import ModuleCount, ModuleSummary, ParameterCount, Summary, count_parameters, summary
from osora.model.parameters import adapter_parameters, parameter_groups
from osora.model.sharing import share_base
from osora.model.state import adapted_layers
from osora.svd.certificate import ConvergenceError
from osora.svd.plan import SvdPlan, svd_plan
from osora.svd.spectrum import Spectrum, rank_for_energy, spectrum
from osora.svd.truncated import TruncatedSVD, truncated_svd

build_info = extension.build_info
__version__ = build_info()["version"]

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "BasisCheck",
    "BasisError",
    "ChangeRecorder",
    "Changes",
    "ConvergenceError",
    "Estimate",
    "InitialisationPlan",
    "Initialised",
    "LayerCheck",
    "Machine",
    "MergedFolder",
    "ModuleCheck",
    "ModuleCount",
    "ModuleSummary",
    "OsoraConfig",
    "ParameterCount",
    "SavedModule",
    "SorsaConfig",
    "Spectrum",
    "Summary",
    "SvdPlan",
    "TruncatedSVD",
    "Verification",
    "WeightChange",
    "__version__",
    "active_adapter",
    "adapted_layers",
    "adapter_info",
    "adapter_names",
    "adapter_parameters",
    "adapters_in_batch",
    "add_adapter",
    "attach",
    "build_info",
    "check_basis",
    "checkpoint_adapters",
    "count_parameters",
    "detach",
    "disabled",
    "estimate",
    "export_lora",
    "initialise",
    "load_adapter",
    "merge",
    "merge_saved",
    "orthonormality",
    "parameter_groups",
    "plan_initialisation",
    "plot_changes",
    "plot_spectra",
    "rank_for_energy",
    "refresh",
    "remove_adapter",
    "restore_adapter",
    "restore_basis",
    "save_adapter",
    "set_adapter",
    "set_execution",
    "share_base",
    "spectrum",
    "summary",
    "svd_plan",
    "truncated_svd",
    "unmerge",
    "verify_adapter",
    "weight_change",
    "weight_changes",
    "write_card",
]
