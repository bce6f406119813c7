"""Seeds of the random streams that follow from the seed of a run and the number of an epoch alone."""


def order_seed(seed: int, epoch: int) -> int:
    """That of the order of the minibatches."""
    return 1_000_003 * seed + epoch


def noise_seed(seed: int, epoch: int, *, process: int = 0) -> int:
    """That of the noise, where it does not go on from a stored state; `process` below 1,009."""
    return 1_009 * order_seed(seed, epoch) + process
