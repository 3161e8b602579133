# SPDX-License-Identifier: Apache-2.0
"""SVD-initialised fine-tuning that never touches the base weight. Start with README.md or :func:`attach`."""

from osora import ops_sorsa as ops_sorsa  # its operators exist as soon as osora is imported
from osora._load import _C
from osora.adapters import (
    active_adapter,
    adapter_names,
    adapters_in_batch,
    add_adapter,
    remove_adapter,
    set_adapter,
)
from osora.analysis import ChangeRecorder, Changes, WeightChange, weight_change, weight_changes
from osora.card import write_card
from osora.checkpoint import AdapterError, load_adapter, save_adapter
from osora.config import OsoraConfig, SorsaConfig
from osora.counts import ModuleCount, ParameterCount, count_parameters
from osora.estimate import Estimate, Machine, estimate
from osora.execution import refresh, set_execution
from osora.export import export_lora
from osora.factors import ConvergenceError, SvdPlan, TruncatedSVD, svd_plan, truncated_svd
from osora.merge import merge, unmerge
from osora.merge_saved import MergedFolder, merge_saved
from osora.patch import adapter_parameters, attach, detach, disabled
from osora.plots import plot_changes, plot_spectra
from osora.resume import checkpoint_adapters, restore_adapter
from osora.saved import AdapterInfo, SavedModule, adapter_info
from osora.sharing import share_base
from osora.spectrum import Spectrum, rank_for_energy, spectrum
from osora.summary import Summary, summary
from osora.training import orthonormality, parameter_groups
from osora.verify import ModuleCheck, Verification, verify_adapter

build_info = _C.build_info
__version__ = build_info()["version"]

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "ChangeRecorder",
    "Changes",
    "ConvergenceError",
    "Estimate",
    "Machine",
    "MergedFolder",
    "ModuleCheck",
    "ModuleCount",
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
    "adapter_info",
    "adapter_names",
    "adapter_parameters",
    "adapters_in_batch",
    "add_adapter",
    "attach",
    "build_info",
    "checkpoint_adapters",
    "count_parameters",
    "detach",
    "disabled",
    "estimate",
    "export_lora",
    "load_adapter",
    "merge",
    "merge_saved",
    "orthonormality",
    "parameter_groups",
    "plot_changes",
    "plot_spectra",
    "rank_for_energy",
    "refresh",
    "remove_adapter",
    "restore_adapter",
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
