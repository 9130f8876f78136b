"""A vLLM engine as lm-eval asks it. vLLM and lm-eval must be installed to import this, which imports both."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.models import vllm_causallms

from affinequant.data.wheels import Say
from affinequant.serve import register_vllm
from affinequant_evals.lm_eval_model import Served

ROWS = 256
"""Prompts that the engine is given at once; it makes batches of its own of them."""
MEMORY = 0.3
"""Share of the main memory that an engine on a CPU may take; on a GPU it takes vLLM's own share."""

_stock: Any = vllm_causallms.VLLM


class Engine(Served, _stock):
    """lm-eval's own class, with the tokenizer of the checkpoint and one policy about BOS."""

    reserve = 1  # a token has to be generated, or nothing is answered

    def __init__(self, folder: Path, tokenizer: Any, *, length: int, dtype: str, say: Say) -> None:
        register_vllm()  # in vain if the package is installed: its entry point did this already
        self.begin(say, "auto")
        on_cpu = {} if torch.cuda.is_available() else {"gpu_memory_utilization": MEMORY}
        super().__init__(
            pretrained=str(folder),
            dtype=dtype,
            max_model_len=length,
            batch_size=ROWS,
            enforce_eager=True,
            disable_log_stats=True,
            **on_cpu,
        )
        self.tokenizer = tokenizer

    def close(self) -> None:
        """End the engine's process, or free what it holds in this one."""
        self.model.llm_engine.engine_core.shutdown()

    def _model_generate(self, requests: list[list[int]], *given: Any, **named: Any) -> Any:
        answers = super()._model_generate(requests, *given, **named)
        self._count(ids[0] for ids in requests)
        return answers
