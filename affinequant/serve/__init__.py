"""Where other people's engines meet our checkpoints. An engine is imported only by the module that speaks to it."""


def register_vllm() -> None:
    """Make vLLM run our checkpoints; it calls this itself in each of its processes (entry point `vllm.general_plugins`).

    Raises:
        RuntimeError: another plugin holds the name of our quantisation method.
    """
    from affinequant.serve.vllm_plugin import register

    register()
