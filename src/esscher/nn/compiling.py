"""Networks compiled with what torch's compiler does not do by itself."""

import warnings
from typing import Any

import torch
from torch import fx, nn
from torch._inductor import config
from torch.nn.functional import scaled_dot_product_attention

from esscher.nn.attention import attention


def compile_network(network: nn.Module, *, final: bool) -> None:
    """Compile a network at its first call with each shape of its input, with thin attention on CPUs
    where no gradient is asked for (see nn/attention.py).

    Args:
        final: whether the weights will not change any more; on a CPU they are then laid out anew, a
            copy, for its products and convolutions, likewise where no gradient is asked for.
    """
    # Of diffusers asking for the version of torch.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    call: Any = torch.compile(network._call_impl, backend=_compiled)

    def frozen(*args: Any, **kwargs: Any) -> Any:
        # Not an option of the compiler's: what is a weight is decided before options are read.
        with config.patch(freezing=True):
            return call(*args, **kwargs)

    on_cpu = all(weight.device.type == "cpu" for weight in network.parameters())
    network._compiled_call_impl = frozen if final and on_cpu else call


def _compiled(graph: fx.GraphModule, inputs: list[Any]) -> Any:
    if not torch.is_grad_enabled():
        for node in graph.graph.nodes:
            if node.target is scaled_dot_product_attention:
                node.target = attention
        graph.recompile()
    return torch._inductor.compile(graph, inputs)
