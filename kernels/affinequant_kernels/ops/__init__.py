"""The ops under `torch.ops.affq`, and the same with named parts for eager code."""

from affinequant_kernels.checks import WEIGHT_ONLY
from affinequant_kernels.ops.calls import kv_pack, kv_unpack, linear, online_linear, row_quant, warm
from affinequant_kernels.ops.table import OPS

__all__ = ["OPS", "WEIGHT_ONLY", "kv_pack", "kv_unpack", "linear", "online_linear", "row_quant", "warm"]
