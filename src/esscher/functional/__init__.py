"""Pure functions of tensors: the mathematics that methods share, without state or side effects.

`*_terms` are un-reduced, `*_loss` are reduced and minimised, `*_target` are regression targets.
Densities, divergences and log-ratios are in nats; horizons and returns count environment steps.
"""
