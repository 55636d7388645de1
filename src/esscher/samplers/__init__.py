"""How samples are drawn from what a model says: token by token, step by step."""

from esscher.samplers.decoding import Decoding, decoding_log_probs, draw, uniforms

__all__ = ["Decoding", "decoding_log_probs", "draw", "uniforms"]
