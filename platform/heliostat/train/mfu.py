"""Model FLOPs utilisation: the share of a device's peak that a training step makes use of."""


def mfu(step_flops: float, seconds: float, devices: int, peak_flops: float) -> float:
    """The share, 0 to 1, of what `devices` of `peak_flops` FLOP/s each could do in `seconds`.

    `step_flops` are those of the model's forward and backward pass over the global batch: what
    recomputation does again is not counted (Chowdhery et al. 2022, appendix B).
    """
    return step_flops / (seconds * devices * peak_flops)


def count_token_flops(parameters: int, layers: int, width: int, length: int) -> int:
    """FLOPs of training a decoder on one token: 6N + 12LHQT (Chowdhery et al. 2022, appendix B).

    `parameters` (N) are those that are multiplied with: an embedding counts where it is the head as
    well. `width` is heads times their width (H Q), `length` the tokens of a block (T). Attention
    counts in full, also the half that a causal mask leaves out, as in published figures.
    """
    return 6 * parameters + 12 * layers * width * length
