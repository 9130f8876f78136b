"""The ops under `torch.ops.affq`, and the same with named parts for eager code."""

from affinequant_kernels.ops.fused import kv_pack, kv_unpack
from affinequant_kernels.ops.online import WEIGHT_ONLY, online_linear, warm
from affinequant_kernels.ops.table import linear, row_quant

__all__ = ["WEIGHT_ONLY", "kv_pack", "kv_unpack", "linear", "online_linear", "row_quant", "warm"]
