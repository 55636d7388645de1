"""Modules whose state is what is trained of them: frozen weights are read again from their source."""

from typing import Any

from torch import nn

from esscher.nn.sharding import placed_like


class TrainedState(nn.Module):
    """A module that saves and loads its trained parameters and its buffers alone."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without what is not trained, and with tied weights once."""
        state = super().state_dict(*args, **kwargs)
        named = dict(self.named_parameters(remove_duplicate=False))
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {
            name: value for name, value in state.items() if name not in named or name in trained
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Of a `state_dict`; strict: with exactly its names."""
        if strict and (state_dict.keys() != (own := self.state_dict().keys())):
            raise ValueError(f"state does not fit: {sorted(state_dict.keys() ^ own)[:5]} differ")
        own = super().state_dict()
        placed = {k: placed_like(v, own[k]) if k in own else v for k, v in state_dict.items()}
        return super().load_state_dict(placed, strict=False, assign=assign)
